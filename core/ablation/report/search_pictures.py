"""The pictures of a search, drawn by optuna: bits per byte of its trials in order, and against each searched field."""

import io
import json
import warnings
from statistics import median
from typing import Any

import numpy as np

from core.ablation.search.search import Searched, distribution, load_optuna

REACH = 4.0
"""A scale ends this many times as far above the best figure as the middle one is: trials beyond are left out."""
AXIS = "bits per byte"


def draw(searched: Searched) -> dict[str, bytes]:
    """Return PNG images, `search` and `search-fields`; none where no trial has a figure."""
    from matplotlib import pyplot

    if searched.best is None:
        return {}
    images = {}
    with pyplot.rc_context(), warnings.catch_warnings():  # optuna sets a style for the whole process
        warnings.simplefilter("ignore")  # it calls its plots experimental, and one trial alone gives an axis no width
        pyplot.switch_backend("agg")  # or a Mac opens windows
        for name, figure in plots(searched).items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            images[name] = buffer.getvalue()
    return images


def plots(searched: Searched) -> dict[str, Any]:
    """Return matplotlib's figures of a search that has a best trial; pyplot holds them until they are closed."""
    optuna = load_optuna()
    study, by_optuna = _study(optuna, searched), optuna.visualization.matplotlib
    names = [field.name for field in searched.search.space]
    drawn = {
        "search": by_optuna.plot_optimization_history(study, target_name=AXIS),
        "search-fields": by_optuna.plot_slice(study, names, target_name=AXIS),
    }
    return {name: _scaled(np.ravel(axes), searched) for name, axes in drawn.items()}


def _scaled(panels: np.ndarray, searched: Searched) -> Any:
    """Return the figure of panels with one scale, on which the best trials can be told apart, and the start."""
    figures = [trial.bpb for trial in searched.trials if trial.bpb is not None]
    low, middle = min(figures), median(figures)
    high = min(max(figures), low + REACH * (middle - low)) if middle > low else max(figures)
    room = (high - low) * 0.06 or 0.005
    start = searched.start.bpb
    for panel in panels:
        panel.set_title("")
        panel.set_ylim(low - room, high + room)
        if start is not None:
            panel.axhline(start, color="black", linestyle="--", linewidth=1, label="Start")
        if panel.get_xscale() == "log":  # matplotlib's own labels overlap on a range of few decades
            left, right = panel.get_xlim()
            places = np.geomspace(left, right, 7)[1:6:2]
            panel.set_xticks(places, [f"{place:.2g}" for place in places])
            panel.set_xticks([], minor=True)
    figure = panels[0].figure
    figure.suptitle("")
    if len(panels) == 1 and panels[0].get_legend():
        panels[0].legend(loc="upper right")
    return figure


def _study(optuna: Any, searched: Searched) -> Any:
    """Return an optuna study of the stored trials under their numbers; those without a figure count as failed."""
    study = optuna.create_study()
    space = searched.search.space
    distributions = {field.name: distribution(optuna, field, [*map(_shown, field.values)]) for field in space}
    for trial in searched.trials:
        if trial.bpb is None or trial is searched.start:  # which need not lie in the space
            study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
            continue
        values = {field.name: _shown(trial.settings[field.name]) for field in space}
        study.add_trial(optuna.trial.create_trial(params=values, distributions=distributions, value=trial.bpb))
    return study


def _shown(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value
