"""A saved run as a model of lm-evaluation-harness (the `lm-eval` package, an optional extra).

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from train.errors import UserError
from train.use.generation import Decoder, continuation
from train.use.saved_run import SavedRun

try:
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.api.model import TemplateLM  # type: ignore[import-not-found]
    from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-not-found]
except ModuleNotFoundError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed (no module {error.name}); run: pip install 'engram-pretrain[harness]'"
    ) from None

_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """What lm-evaluation-harness asks of a model, answered by a saved run.

    Example:
        >>> simple_evaluate(model=HarnessModel(SavedRun.open("runs/tiny")), tasks=["arc_easy"])
    """

    def __init__(self, run: SavedRun) -> None:
        """Args: the checkpoint."""
        super().__init__()
        self._run, self._tables, self._model = run, run.tables(), run.model()
        self._text = run.tokenizer
        self._max_length = run.job.data.longest
        self._device = next(self._model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self._text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, for caches of requests."""
        return self._text.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; there are no special tokens to add."""
        return self._text.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts: every token is predicted once, windows are as long as in training."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.eot_token_id, max_seq_len=self._max_length, context_len=1
            )
            asked = [(("", ""), *make_disjoint_window(window)) for window in windows]
            totals.append(sum(found for found, _ in self._loglikelihood_tokens(asked)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts until a stop text, the end of the document or the number of tokens asked for."""
        return [self._generate(*request.args) for request in requests]

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each request's continuation, and whether it is what greedy decoding gives."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        size = self._run.job.train.micro_batch_size
        return [found for start in range(0, len(pairs), size) for found in self._score(pairs[start : start + size])]

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        # The last token predicts nothing. A context that is too long is cut at its start.
        inputs = [(context + continuation)[-self._max_length - 1 : -1] for context, continuation in pairs]
        length = max(map(len, inputs))
        # Causal, and no expert drops a token: padding on the right changes nothing before it.
        tokens_BT = torch.tensor([ids + [self._text.pad_id] * (length - len(ids)) for ids in inputs])
        positions_BT = torch.arange(length).expand_as(tokens_BT)
        memory = self._tables.look_up(tokens_BT, positions_BT, self._device) if self._tables else []
        logits_BTV = self._model(tokens_BT.to(self._device), positions_BT.to(self._device), memory)
        for ids, (_, asked), logits_TV in zip(inputs, pairs, logits_BTV, strict=True):
            wanted = torch.tensor(asked[-len(ids) :], device=self._device)
            found = logits_TV[len(ids) - len(wanted) : len(ids)].float().log_softmax(-1)
            greedy = bool((found.argmax(-1) == wanted).all())
            yield float(found.gather(1, wanted.unsqueeze(1)).sum()), greedy

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        stops = options.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
        generated: list[int] = []
        with Decoder(self._model, self._tables, self._max_length) as decoder:
            for token in continuation(
                decoder,
                self._text,
                self.tok_encode(context),
                num_tokens=options.get("max_gen_toks", _MAX_NEW_TOKENS),
                temperature=temperature,
                top_k=options.get("top_k"),
                generator=torch.Generator().manual_seed(0),
            ):
                generated.append(token)
                text = self._text.decode(generated)
                if found := [text.find(stop) for stop in stops if stop in text]:
                    return text[: min(found)]
        return self._text.decode(generated)


def run_tasks(
    run: SavedRun,
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness.

    Args:
        run: the checkpoint.
        tasks: their names.
        folder: of more task files.
        shots: worked examples before each question; None for the task's own number.
        limit: takes only the first questions of each task.

    Returns:
        JSON-able: `step`, and under `tasks` the figures of each.

    Raises:
        UserError: no such task or folder.
    """
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of task files")
    manager = _task_manager(tasks, folder)
    found = simple_evaluate(
        model=HarnessModel(run), tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    figures = {
        task: {name: value for name, value in values.items() if isinstance(value, int | float)}
        for task, values in found["results"].items()
    }
    return {"step": run.step, "tasks": figures}


def _task_manager(tasks: Sequence[str], folder: str | None) -> Any:
    # The harness takes many seconds to look through its own thousands of tasks.
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise UserError(f"{unknown[0]}: lm-evaluation-harness has no such task; list them: lm_eval ls tasks")
    return manager
