"""The rows of Tables 3-5 of arXiv:2310.02296v1, and of questions that the paper leaves open.

Data only; ``ablate.py`` runs them. A row names the fields in which it differs from the base: the
recipe of the data set (``miniworld``, ``folder``), or that recipe with the literal Pixel Learning
Module. A row with ``checkpoints_of`` trains nothing: it evaluates the students of another row.

    3         the terms of the loss                            Table 3
    4         pooling of the Global Learning Module            Table 4
    5         Vision-Language Adapter                          Table 5
    bounds    lower and upper bounds of the method
    readings  choices that the paper's text leaves open
    windows   CLS tokens of windows of the image, beyond the paper
    main      the rows above that answer most, in one table
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from cliptteacher.training.paper_recipes import PAPER_ROWS, Scores
from cliptteacher.training.recipes import V2

CLIP_DENSE = "clip_dense"  # the one row without a student

# The Pixel Learning Module as in the paper's text, over a recipe that softens it.
LITERAL: dict[str, Any] = {
    "potential_scope": "batch",
    "potential_slots": None,
    "pseudo_similarity": "dot",
    "pseudo_scale": 1.0,
    "detach_prototypes": False,
    "seen_competition": True,
}
BASES: dict[str, dict[str, Any]] = {"recipe": {}, "literal": LITERAL}


@dataclass(frozen=True)
class AblationRow:
    """One row of one table."""

    name: str
    title: str
    paper: str | None = None  # name of the paper's row, ablation_<paper>
    overrides: dict[str, Any] = field(default_factory=dict)  # fields, over those of the base
    checkpoints_of: str | None = None  # evaluate the students of this row instead of training
    gamma: float | None = None  # at this gamma
    split: str | None = None  # on this split; None: the one that the base is tested on
    calibrate_on: str | None = None  # or at the gamma that is best on this split

    @property
    def paper_scores(self) -> Scores | None:
        """What the paper reports: pAcc, mIoU(S), mIoU(U), hIoU in percent."""
        return None if self.paper is None else PAPER_ROWS[f"ablation_{self.paper}"].scores


def _row(name: str, title: str, paper: str | None = None, **overrides: Any) -> AblationRow:
    return AblationRow(name, title, paper, overrides)


_FULL = _row("full", "full", "full")
_NO_GLM_5 = AblationRow(
    "no_glm_gamma_5", "without GLM, gamma 5", "no_glm", checkpoints_of="no_glm", gamma=5.0
)
_TABLE_3 = (
    _FULL,
    _row("no_nel", "without focal and dice", "no_focal_dice", focal_weight=0.0, dice_weight=0.0),
    _row("no_ce", "without any cross entropy", "no_ce", ce="none"),
    _row("seen_ce", "cross entropy on seen pixels only", ce="seen"),
    _row("no_glm", "without GLM, gamma of the base", global_weight=0.0),
    _NO_GLM_5,
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

_NO_UNSEEN: dict[str, Any] = {"global_weight": 0.0, "ce": "seen", "generate_weight": 0.0}
_NO_TERM = {**_NO_UNSEEN, "ce": "none", "focal_weight": 0.0, "dice_weight": 0.0}
_CLOSED_SET = _row("closed_set", "upper bound: labels of all classes", setting="closed_set")
_TRANSDUCTIVE = _row("transductive", "names of the unseen classes known", setting="transductive")
_BOUNDS = (
    _FULL,
    _TRANSDUCTIVE,
    _CLOSED_SET,
    _row("seen_only", "seen labels only: no GLM, no PLM", **_NO_UNSEEN),
    _row("distill", "student of CLIP's dense tokens only", **_NO_TERM, distill_weight=1.0),
    AblationRow(CLIP_DENSE, "CLIP's dense tokens, no student"),
)


def _gamma(gamma: float) -> AblationRow:
    name, title = f"gamma_{gamma:g}", f"gamma {gamma:g}, on val"
    return AblationRow(name, title, checkpoints_of="full", gamma=gamma, split="val")


def _scales(*scales: int) -> AblationRow:
    return _row(f"scales_{'_'.join(map(str, scales))}", f"scales {scales}", scales=scales)


_COSINE: dict[str, Any] = {"pseudo_similarity": "cosine", "pseudo_scale": 10.0}
_READINGS = (
    _FULL,
    *(_row(f"seeding_{v}", f"seeding {v}", seeding=v) for v in ("grid", "window", "sliding")),
    *(_row(f"tokens_{v}", f"tokens {v}", tokens=v) for v in ("projected", "final")),
    *(_row(f"scope_{v}", f"potential scope {v}", potential_scope=v) for v in ("image", "batch")),
    _row("generate_mse", "L_generate mse", generate_loss="mse"),
    _row("generate_bce", "L_generate bce (v2)", generate_loss="bce"),
    _row("pseudo_dot", "pseudo logits dot", pseudo_similarity="dot", pseudo_scale=1.0),
    _row("pseudo_cosine", "pseudo logits cosine x 10", **_COSINE),
    _row("v2", "L_generate bce, pseudo logits cosine x 10 (v2)", **V2),
    *(_row(f"bank_{v}", f"CLS bank {v}", bank_size=v) for v in (0, 24)),
    *(_row(f"lambda_{v:g}", f"lambda {v:g}", fusion_threshold=v) for v in (0.7, 0.8, 0.9)),
    _row("one_group", "lambda -1: one group", fusion_threshold=-1.0),
    *(_scales(3), _scales(7), _scales(3, 7), _scales(5)),
    *(_row(f"kmeans_{v}", f"K-Means iterations {v}", kmeans_iterations=v) for v in (3, 10, 30)),
    _row("detach_on", "prototypes detached", detach_prototypes=True),
    _row("detach_off", "prototypes not detached", detach_prototypes=False),
    _row("seen_competition_on", "seen competition on", seen_competition=True),
    _row("seen_competition_off", "seen competition off", seen_competition=False),
    *map(_gamma, (-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0)),
)
_WINDOWS = (
    _FULL,
    *(
        _row(f"windows_{'_'.join(map(str, sizes))}", f"GLM with windows {sizes}", glm_windows=sizes)
        for sizes in ((1, 2), (2,), (2, 4), (4,))
    ),
    _CLOSED_SET,
)

_BY_NAME = {row.name: row for row in (*_WINDOWS, *_BOUNDS, *_TABLE_3)}
_MAIN = (
    *("full", "no_glm", "seen_ce", "no_ce", "no_generate", "windows_2", "windows_2_4"),
    *("seen_only", "closed_set", CLIP_DENSE),
)
TABLES: dict[str, tuple[AblationRow, ...]] = {
    "3": _TABLE_3,
    "4": _TABLE_4,
    "5": _TABLE_5,
    "bounds": _BOUNDS,
    "readings": _READINGS,
    "windows": _WINDOWS,
    "main": tuple(_BY_NAME[name] for name in _MAIN),
}


def calibrated(rows: Iterable[AblationRow]) -> tuple[AblationRow, ...]:
    """The students of all rows that train, each at the gamma that is best on validation scenes.

    Rows differ in the size of their logits: one gamma for all favours the row it was chosen for.
    """
    trained = [row for row in rows if row.checkpoints_of is None and row.name != CLIP_DENSE]
    return tuple(
        replace(row, name=f"{row.name}@val", title=f"{row.title}, own gamma", overrides={})
        for row in (replace(row, checkpoints_of=row.name, calibrate_on="val") for row in trained)
    )


def select_rows(table: str | None, names: list[str] | None = None) -> tuple[AblationRow, ...]:
    """Pick rows of a table, or of all tables, by name; ``full`` is always the first.

    Args:
        table: key of ``TABLES``; None looks the names up in all of them.
        names: rows to keep; None keeps all. A row that evaluates the students of another row
            brings that row with it.

    Raises:
        ValueError: neither is given, or there is no such row.
    """
    if table is None and names is None:
        raise ValueError("give --table, or rows of any table with --rows")
    known: dict[str, AblationRow] = {}
    for row in TABLES[table] if table else (row for rows in TABLES.values() for row in rows):
        known.setdefault(row.name, row)
    wanted = {"full", *(known if names is None else names)}
    for name in wanted - known.keys():
        where = f"table {table} has no" if table else "no table has a"
        raise ValueError(f"{where} row {name!r}; the rows are {', '.join(known)}")
    wanted |= {known[name].checkpoints_of or name for name in wanted}
    return tuple(row for name, row in known.items() if name in wanted)
