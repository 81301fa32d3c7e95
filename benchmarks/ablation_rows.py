"""The rows of Tables 3-5 of arXiv:2310.02296v1, and of the questions that the paper leaves open.

Data only; ``benchmarks/ablate.py`` runs them. A row says in which fields it differs from the base:
the recipe of the data set (``miniworld``, ``folder``), or that recipe with the literal Pixel
Learning Module. A row with ``checkpoints_of`` trains nothing: it evaluates the students of another
row with another gamma.

    3         the terms of the loss                            Table 3
    4         pooling of the Global Learning Module            Table 4
    5         Vision-Language Adapter                          Table 5
    bounds    upper and lower bounds that the paper lacks
    readings  choices that the paper's text leaves open
    windows   CLS tokens of windows of the image, beyond the paper
    main      the rows above that answer most, in one table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cliptteacher.training.paper_recipes import PAPER_ROWS, Scores

CLIP_ONLY = "clip_dense"  # the one row without a student

# The Pixel Learning Module as the paper's text has it, on top of a recipe that reads it gently.
LITERAL: dict[str, Any] = {
    "potential_scope": "batch",
    "potential_slots": None,
    "pseudo_similarity": "dot",
    "pseudo_scale": 1.0,
    "detach_prototypes": False,
    "seen_competition": True,
}
BASES: dict[str, dict[str, Any]] = {"recipe": {}, "literal": LITERAL}


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """One row of one table."""

    name: str
    title: str
    overrides: dict[str, Any] = field(default_factory=dict)  # fields, over those of the base
    paper: str | None = None  # name of the paper's row, ablation_<paper>
    checkpoints_of: str | None = None  # evaluate the students of this row instead of training
    gamma: float | None = None  # at this gamma

    @property
    def paper_scores(self) -> Scores | None:
        """What the paper reports: pAcc, mIoU(S), mIoU(U), hIoU in percent."""
        return None if self.paper is None else PAPER_ROWS[f"ablation_{self.paper}"].scores


def _row(name: str, title: str, paper: str | None = None, **overrides: Any) -> AblationRow:
    return AblationRow(name=name, title=title, paper=paper, overrides=overrides)


def _values(name: str, title: str, option: str, values: Sequence[Any]) -> list[AblationRow]:
    """A row for every value of one option."""
    rows = []
    for value in values:
        words = "_".join(map(str, value)) if isinstance(value, tuple) else str(value)
        rows.append(_row(f"{name}_{words}", f"{title} {value}", **{option: value}))
    return rows


_FULL = _row("full", "full", paper="full")
_CLOSED_SET = _row("closed_set", "upper bound: labels of all classes", closed_set=True)
_TERMS_OFF: dict[str, Any] = {
    **{"global_weight": 0.0, "ce": "none", "focal_weight": 0.0, "dice_weight": 0.0},
    "generate_weight": 0.0,
}
_TABLE_3 = (
    _FULL,
    _row("no_nel", "without focal and dice", "no_focal_dice", focal_weight=0.0, dice_weight=0.0),
    _row("no_ce", "without any cross entropy", "no_ce", ce="none"),
    _row("seen_ce", "cross entropy on seen pixels only", ce="seen"),
    _row("no_glm", "without GLM, gamma of the base", global_weight=0.0),
    AblationRow(
        name="no_glm_gamma_5",
        title="without GLM, gamma 5",
        paper="no_glm",
        checkpoints_of="no_glm",
        gamma=5.0,
    ),
    _row("no_generate", "without L_generate", "no_generate", generate_weight=0.0),
)
_TABLE_4 = (
    _FULL,
    _row("glm_mean", "GLM: mean", "glm_mean", glm_pooling="mean"),
    _row("glm_max", "GLM: max", "glm_max", glm_pooling="max"),
)
_TABLE_5 = (
    _FULL,
    _row("adapter_mlp", "adapter: MLP", "adapter_mlp", adapter="mlp"),
    _row("adapter_identity", "adapter: none", "adapter_identity", adapter="identity"),
)
_BOUNDS = (
    _FULL,
    _CLOSED_SET,
    _row(
        "seen_only",
        "seen labels only: no GLM, no PLM",
        global_weight=0.0,
        ce="seen",
        generate_weight=0.0,
    ),
    _row("distill", "student of CLIP's dense tokens only", **_TERMS_OFF, distill_weight=1.0),
    AblationRow(name=CLIP_ONLY, title="CLIP's dense tokens, no student"),
)
_READINGS = (
    _FULL,
    *_values("seeding", "seeding", "seeding", ("grid", "window", "sliding")),
    *_values("tokens", "tokens", "tokens", ("projected", "final")),
    *_values("scope", "potential scope", "potential_scope", ("image", "batch")),
    _row("generate_mse", "L_generate mse", generate_loss="mse"),
    _row("generate_bce", "L_generate bce (v2)", generate_loss="bce"),
    _row("pseudo_dot", "pseudo logits dot", pseudo_similarity="dot", pseudo_scale=1.0),
    _row(
        "pseudo_cosine", "pseudo logits cosine x 10", pseudo_similarity="cosine", pseudo_scale=10.0
    ),
    *_values("bank", "CLS bank", "bank_size", (0, 24)),
    *_values("lambda", "lambda", "fusion_threshold", (0.7, 0.8, 0.9)),
    _row("one_group", "lambda -1: one group", fusion_threshold=-1.0),  # one group an image
    *_values("scales", "scales", "scales", ((3,), (7,), (3, 7), (5,))),
    *_values("kmeans", "K-Means iterations", "kmeans_iterations", (3, 10, 30)),
    _row("detach_on", "prototypes detached", detach_prototypes=True),
    _row("detach_off", "prototypes not detached", detach_prototypes=False),
    _row("seen_competition_on", "seen competition on", seen_competition=True),
    _row("seen_competition_off", "seen competition off", seen_competition=False),
)
_WINDOWS = (
    _FULL,
    *_values("windows", "GLM with windows", "glm_windows", ((1, 2), (2,), (2, 4), (4,))),
    _CLOSED_SET,
)

_MAIN_NAMES = (
    *("full", "no_glm", "seen_ce", "no_ce", "no_generate", "windows_2", "windows_2_4"),
    *("seen_only", "closed_set", CLIP_ONLY),
)
_BY_NAME = {row.name: row for row in (*_WINDOWS, *_BOUNDS, *_TABLE_3)}

TABLES: dict[str, tuple[AblationRow, ...]] = {
    "3": _TABLE_3,
    "4": _TABLE_4,
    "5": _TABLE_5,
    "bounds": _BOUNDS,
    "readings": _READINGS,
    "windows": _WINDOWS,
    "main": tuple(_BY_NAME[name] for name in _MAIN_NAMES),
}


def select_rows(table: str, names: Sequence[str] | None = None) -> tuple[AblationRow, ...]:
    """Pick rows of a table by name, in the table's order; ``full`` is always among them.

    Args:
        table: key of ``TABLES``.
        names: rows to keep; None keeps all. A row of students that another row trains brings
            that row with it.

    Raises:
        ValueError: the table has no such row.
    """
    rows = TABLES[table]
    if names is None:
        return rows
    known = {row.name: row for row in rows}
    for name in names:
        if name not in known:
            raise ValueError(f"table {table} has the rows {', '.join(known)}, got {name!r}")
    wanted = {"full", *names}
    wanted |= {known[name].checkpoints_of or name for name in names}
    return tuple(row for row in rows if row.name in wanted)
