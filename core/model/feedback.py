"""Feedback: what a repeat of layers is given is corrected by what the pass before it put out."""

from dataclasses import dataclass, replace

from core.checks import require, require_least
from core.model.table import Init, Model, Part, Rows, matrix


@dataclass(frozen=True)
class Feedback(Part):
    """Begin a repeat where its layers began, scaled and shifted by what the pass before has made of the token."""

    width: int = 0
    """Numbers of a token by which it is corrected; 0: a repeat goes on from what the pass before put out."""

    def check(self, model: Model) -> None:
        """Raise ConfigError for settings that cannot be built."""
        require_least("model.feedback", self, 0, "width")
        if self.width == 0:
            return
        given, order = f"model.feedback.width={self.width}", model.repeat_order
        good = bool(model.repeat_layers)
        require(good, f"{given}: no pass comes after another; name layers in model.repeat_layers, or leave it out")
        where = f"{given} corrects a whole pass, with model.repeat_order={order} there is none; take after"
        require(order == "after", where)

    def rows(self, model: Model) -> Rows:
        """Return the parameters: of all repeats the same."""
        zero = Init("constant", 0.0)
        rows = {"pool": matrix(model, self.width, model.dim)}
        rows |= {name: matrix(model, model.dim, self.width, init=zero) for name in ("scale", "shift")}
        return {f"{name}.weight": row for name, row in rows.items()}

    def values(self, model: Model, seq: int, scores: bool) -> int:
        """Return about how many numbers of one token the backward pass needs again."""
        return 3 * model.dim + self.width

    def mini(self, model: Model, dim: int) -> "Feedback":
        """Return settings of the same width, measured by the stream's."""
        return replace(self, width=-(-self.width * dim // model.dim))
