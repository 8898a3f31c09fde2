"""The tasks of `minitron finetune` by their names."""

from __future__ import annotations

from .answer_job import answer_job
from .chat_job import chat_job
from .label_job import label_job
from .name_job import name_job
from .pair_job import dpo_job, reward_job
from .task import Inputs, Job

JOBS = {
    "chat": chat_job,
    "classify": label_job,
    "ner": name_job,
    "qa": answer_job,
    "dpo": dpo_job,
    "reward": reward_job,
}


def prepare_job(inputs: Inputs) -> Job:
    """Read the rows of a task and load the model.

    Raises:
        ValueError: rows that cannot be used; the message names file and line.
    """
    return JOBS[inputs.options.task](inputs)
