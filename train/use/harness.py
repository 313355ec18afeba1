"""Tasks of lm-evaluation-harness (the `lm-eval` package, an optional extra) on a saved run."""

import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.use.saved_run import SavedRun

try:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from train.use.harness_model import HarnessModel
except ModuleNotFoundError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed (no module {error.name}); run: pip install 'engram-pretrain[harness]'"
    ) from None
except ImportError as error:  # a name that an older version lacks
    raise UserError(
        f"lm-evaluation-harness is too old ({error}); run: pip install --upgrade 'engram-pretrain[harness]'"
    ) from None

__all__ = ["HarnessModel", "run_tasks"]

_RESAMPLES = 1000
"""Of the questions, for standard errors that have no formula: they are known to 2 % then."""


class _Tasks(TaskManager):
    """Tells in one line of tasks that cannot be loaded: their files are the user's, their data comes from afar."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:
            told = str(error).strip().splitlines()
            raise UserError(
                f"tasks {', '.join(map(str, task_list))}: cannot be loaded ({type(error).__name__}"
                f"{': ' + told[0] if told else ''}); check their files (--include), and that their data can be reached "
                "or is in the cache (HF_DATASETS_CACHE)"
            ) from error


def run_tasks(
    run: SavedRun,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Runs tasks of lm-evaluation-harness; on several ranks, if torch.distributed is initialised. Collective.

    Args:
        run: the checkpoint.
        tasks: their names.
        folder: of more task files.
        shots: worked examples before each question; None for the task's own number.
        limit: takes only the first questions of each task.
        seed: of texts that are sampled.

    Returns:
        JSON-able, on rank 0: `step`, and under `tasks` the figures of each with their standard errors. None on others.

    Raises:
        UserError: no such task or folder, or a task that asks for what the model cannot do.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of task files")
    model = HarnessModel(run, seed=seed)
    if limit is not None and limit < model.world_size:
        raise UserError(f"--limit {limit} leaves some of {model.world_size} ranks without a question; use fewer ranks")
    with redirect_stdout(sys.stderr):  # the harness prints to where the answer belongs
        found = simple_evaluate(
            model=model, tasks=list(tasks), task_manager=_task_manager(tasks, folder), num_fewshot=shots, limit=limit,
            log_samples=False, bootstrap_iters=_RESAMPLES,
        )  # fmt: skip
    if found is None:
        return None
    figures = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    return {"step": run.step, "tasks": figures}


def _task_manager(tasks: Sequence[str], folder: str | None) -> Any:
    # The harness takes many seconds to look through its own thousands of tasks.
    if folder is not None:
        manager = _Tasks(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = _Tasks(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"{unknown[0]}: lm-evaluation-harness has no such task; list them: lm_eval ls tasks")
    return manager
