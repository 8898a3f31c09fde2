"""The stages of `minitron curate` as one step of a datatrove pipeline.

python examples/datatrove_step.py crawl/ clean/ gopher
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from itertools import islice
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from minitron.curate.batch import Batch, Evidence, run_stages
from minitron.curate.recipe import load_recipe
from minitron.curate.stages import stages_of
from minitron.curate.tally import StageTally
from minitron.curate.texts import Texts

AT_ONCE = 1000


class MinitronStages(PipelineStep):
    """The per-document stages of a recipe; duplicates across documents are left to datatrove's own steps."""

    name = "minitron curate"
    type = "filter"

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Generator[Document, None, None]:
        """Documents that stay, with their changed texts."""
        stages = stages_of(load_recipe(self.recipe))
        evidence = Evidence({name: StageTally() for name in stages})
        documents: Any = iter(data)
        while group := list(islice(documents, AT_ONCE)):
            rows = [str(number) for number in range(len(group))]
            batch = Batch(Texts.of(document.text for document in group), rows, rows)
            done = run_stages(batch, stages, evidence)
            for row, text in zip(done.sources, done.texts.to_list(), strict=True):
                group[int(row)].text = text
                yield group[int(row)]
        for name, tally in evidence.tallies.items():
            self.stat_update(f"removed by {name}", value=sum(tally.removed.values()))


if __name__ == "__main__":
    source, target, recipe = sys.argv[1:]
    LocalPipelineExecutor(
        [JsonlReader(source), MinitronStages(recipe), JsonlWriter(target)], logging_dir=f"{target}/logs"
    ).run()
