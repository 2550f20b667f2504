"""What scaling.py is made of: the model, the ranks, what they tell each other, the page."""
