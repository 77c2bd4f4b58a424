"""The results file, written anew after every task, so that finished tasks are never lost."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quality_plots import ACCURACIES, plot_accuracies, plot_task
from quality_results import TaskResult
from quality_tables import print_result
from replace_text import replace_text


def run_tasks(
    tasks: Mapping[str, Callable[[], TaskResult]],
    path: Path,
    facts: Mapping[str, Any],
    plots: Path | None = None,
) -> None:
    """Run tasks; save, print and plot what each of them reports.

    Args:
        tasks: name -> the task.
        path: of the JSON file.
        facts: what it begins with: the machine, the command, the settings.
        plots: folder of plots and contact sheets; None: none are made.

    What a task raises is passed on, after saying which results have been saved.
    """
    results: list[TaskResult] = []
    saved: dict[str, Any] = {}
    try:
        for name, task in tasks.items():
            start = time.perf_counter()
            result = task()
            seconds = round(time.perf_counter() - start, 1)
            results.append(result)
            saved[name] = {"seconds": seconds, **result.to_dict()}
            content = {**facts, "tasks": saved}
            replace_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
            print_result(result)
            if plots is not None:
                plot_task(plots, result)
    finally:
        if results:
            print(f"{path}: {', '.join(saved)}")
            if plots is not None:
                plot_accuracies(plots / ACCURACIES, results)
