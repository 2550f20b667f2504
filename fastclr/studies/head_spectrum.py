"""What a head does to the space: spectra, and maps of h beside z, with numbers."""

from __future__ import annotations

from collections.abc import Sequence

from fastclr.studies.scales import Scale, changed
from fastclr.studies.study import RANKS, Arm, Claim, Study

SQUARE, MLP = "linear, square", "mlp"


def arms(scale: Scale) -> dict[str, Arm]:
    """Return the source's square linear head, and the scale's own."""
    square = changed(scale.base, "head", kind="linear", output_dim=scale.feature_dim)
    return {SQUARE: Arm(square), MLP: Arm(scale.base)}


def claims(arms: Sequence[str]) -> list[Claim]:
    """Return what spectra and neighbours show; a picture judges nothing."""
    both = (SQUARE, MLP)
    return [
        Claim(
            "training lowers the effective rank of the linear head",
            (SQUARE,),
            (SQUARE,),
            score="first_weights.fc1",
            than_score="weights.fc1",
        ),
        Claim("z has a lower effective rank than h", both, both, "h.rank", "z.rank"),
        Claim(
            "classes are further apart in h than in z, by silhouette",
            both,
            both,
            "h.silhouette",
            "z.silhouette",
        ),
        Claim("kNN is better in h than in z", both, both, "h.knn", "z.knn"),
        Claim(
            "in the plane of t-SNE more nearest neighbours are of one class in h than in z",
            both,
            both,
            "h.in_plane",
            "z.in_plane",
            not_judged="a picture is not the space",
        ),
    ]


STUDY = Study(
    title="What the head does to the space",
    question=(
        "Singular values of the head's first layer and of the covariances of h and z, effective "
        "ranks, silhouettes of the classes (cosine, -1 to 1), and t-SNE of h beside z: the share "
        "of test images whose nearest neighbour in the plane is of their class. The source shows "
        "eigenvalues of a square linear head, of which few are large, and t-SNE pictures, and "
        "gives no number of either."
    ),
    source="Chen et al. 2020, appendix B.4.",
    arms=arms,
    columns={
        "weights, rank": "weights.fc1",
        "first weights, rank": "first_weights.fc1",
        **RANKS,
        "h, silhouette": "h.silhouette",
        "z, silhouette": "z.silhouette",
        "h, kNN": "h.knn",
        "z, kNN": "z.knn",
        "h, in the plane": "h.in_plane",
        "z, in the plane": "z.in_plane",
    },
    claims=claims,
    work="spaces",
    figure="spaces",
    drawn=("h, in the plane", "z, in the plane"),
)
