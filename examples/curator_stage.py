"""The stages of `minitron curate` as one stage of a NeMo Curator pipeline: a batch of documents in and out.

from curator_stage import MinitronStage

pipeline.add_stage(MinitronStage("gopher"))
"""

from __future__ import annotations

from typing import Any

from nemo_curator.stages.base import ProcessingStage
from nemo_curator.tasks import DocumentBatch

from minitron.curate.ray_calls import StagesOfBatch
from minitron.curate.recipe import load_recipe


class MinitronStage(ProcessingStage[DocumentBatch, DocumentBatch]):
    """The per-document stages of a recipe; duplicates across documents are left to Curator's own stages."""

    name = "minitron_curate"

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._stages: StagesOfBatch | None = None

    def inputs(self) -> tuple[list[str], list[str]]:
        """Attributes and columns that the stage reads."""
        return ["data"], ["text"]

    def outputs(self) -> tuple[list[str], list[str]]:
        """Attributes and columns that the stage writes."""
        return ["data"], ["text"]

    def setup(self, worker_metadata: Any = None) -> None:
        """Load models and compile kernels, once in each worker."""
        self._stages = StagesOfBatch(load_recipe(self.recipe))

    def process(self, task: DocumentBatch) -> DocumentBatch:
        """The documents of a batch that stay."""
        if self._stages is None:
            self.setup()
        assert self._stages is not None
        kept = self._stages(task.to_pyarrow())
        return DocumentBatch(
            dataset_name=task.dataset_name, data=kept, _metadata=task._metadata, _stage_perf=task._stage_perf
        )
