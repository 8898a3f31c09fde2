"""The steps of a curation as Ray Data operators, on a cluster whose nodes see the same files.

A step maps the parts (or shards) of the run; what a call writes is the same bits as on one machine, and the comparison
of all documents runs in the first process. `StagesOfBatch` is the per-document stages alone, for other pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .recipe import Recipe


def on_ray(address: str, workers: int) -> Callable[..., Iterator[int]]:
    """What `run.curate` takes as `each`.

    Args:
        address: of a cluster; "local" starts one on this machine with as many CPUs as workers.
        workers: of a local cluster.

    Raises:
        ValueError: Ray is not installed, or the cluster does not answer.
    """
    ray = _library()
    if not ray.is_initialized():
        try:
            if address == "local":
                ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
            else:
                ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise ValueError(f"ray: no cluster at {address} ({error})") from None

    def each(work: Callable[..., None], calls: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
        if not calls:
            return
        held = ray.put(calls)  # once, not in every task

        def call(row: dict[str, Any]) -> dict[str, Any]:
            work(*ray.get(held)[row["call"]])
            return row

        rows = ray.data.from_items([{"call": i} for i in range(len(calls))], override_num_blocks=len(calls))
        done = rows.map(call, compute=ray.data.TaskPoolStrategy(size=min(workers, len(calls))))
        for count, _ in enumerate(done.iter_rows(), 1):
            yield count

    return each


def _library() -> Any:
    try:
        import ray  # type: ignore[reportMissingImports] (an extra)
        import ray.data  # type: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise ValueError("Ray is missing; install it with: pip install 'minitron[ray]'") from None
    return ray


class StagesOfBatch:
    """The per-document stages of a recipe for `Dataset.map_batches(..., batch_format="pyarrow")`.

    A batch is a table with a column `text`; its other columns stay. The result has the documents that stay, with their
    changed texts and, if they were identified, `language` and `language_score`.
    """

    def __init__(self, recipe: Recipe) -> None:
        from .stages import stages_of

        self._stages = stages_of(recipe)

    def __call__(self, table: Any) -> Any:
        """The rows of a table that stay."""
        import pyarrow as pa

        from .batch import Batch, Evidence, run_stages
        from .tally import StageTally
        from .texts import Texts

        texts = table.column("text").to_pylist()
        rows = [str(index) for index in range(len(texts))]
        batch = Batch(Texts.of(texts), rows, rows)
        done = run_stages(batch, self._stages, Evidence({name: StageTally() for name in self._stages}))
        kept = table.take(pa.array(np.asarray(done.sources, dtype=np.int64)))
        kept = kept.set_column(kept.schema.get_field_index("text"), "text", pa.array(done.texts.to_list(), pa.string()))
        if done.languages is not None:
            codes, scores = done.languages
            kept = kept.append_column("language", pa.array(codes, pa.string()))
            kept = kept.append_column("language_score", pa.array(scores, pa.float32()))
        return kept
