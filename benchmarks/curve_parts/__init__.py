"""What curves.py is made of: steps by batch, reading by shards, start-up by samples, the page."""
