"""Heads on the Nemotron decoder: sequence classification, question answering, token classification.

Letters of shapes: B batch, T tokens, D hidden, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .cache import LegacyCache
from .config import NemotronConfig
from .framework import CACHE_NAME, can_return_tuple
from .model import NemotronModel, NemotronPreTrainedModel, check_ids
from .ops.loss import IGNORE_INDEX, cross_entropy


class NemotronForSequenceClassification(NemotronPreTrainedModel):
    """One label per sequence, judged at its last token."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = NemotronModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, C); other arguments as of `NemotronModel.forward`.

        The last token is the rightmost one that is not `config.pad_token_id`. Without a pad id, or with
        `inputs_embeds`, it is the last position of each row, in batches of any size.

        Args:
            labels: (B,) integers below C: cross-entropy; (B,) with C = 1: mean squared error; (B, C) floats: binary
                cross-entropy. `config.problem_type` overrides this and is set by it, as upstream does.
            **kwargs: `num_items_in_batch` divides the sum over labels instead of their number here; the rest goes to
                the attention function.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden: Tensor = outputs.last_hidden_state
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        # Every position is scored, as upstream does: a product of another shape would differ in the last bit.
        logits = self.score(hidden)[rows, self._last_token(input_ids, hidden)]
        loss = None
        if labels is not None:
            if self.num_labels > 1 and labels.dtype in (torch.long, torch.int):
                check_ids(labels, self.num_labels, "labels", ignore=IGNORE_INDEX)
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
            if num_items is not None:  # the share of this part of a batch that is taken in several parts
                loss = loss * ((labels != IGNORE_INDEX).sum().to(loss.device) / num_items)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _last_token(self, input_ids: Tensor | None, hidden: Tensor) -> Tensor | int:
        if input_ids is None or self.config.pad_token_id is None:
            return -1
        real = (input_ids != self.config.pad_token_id).to(hidden.device, torch.int32)
        return (torch.arange(input_ids.shape[1], device=hidden.device, dtype=torch.int32) * real).argmax(-1)


class NemotronForQuestionAnswering(NemotronPreTrainedModel):
    """Start and end of an answer within the sequence. The backbone is named `transformer`, as upstream names it.

    transformers 5 has no pipeline for this class any more; `docs/compatibility.md` shows how to read an answer.
    """

    base_model_prefix = "transformer"

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__(config)
        self.transformer = NemotronModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.transformer.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer.embed_tokens = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Start and end scores, (B, T) each; other arguments as of `NemotronModel.forward`.

        Args:
            start_positions, end_positions: (B,) indices of the first and last token of the answer. The loss is the
                mean of the two cross-entropies; positions outside the sequence, negative ones too, do not count.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            start_loss, end_loss = (cross_entropy(logits, _inside(at, logits), num_items) for logits, at in pairs)
            loss = (start_loss + end_loss) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),  # type: ignore[arg-type]
            end_logits=end_logits.contiguous(),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _inside(positions: Tensor, logits: Tensor) -> Tensor:
    """Positions (B,) or (B, 1) on the device of the logits (B, T), those outside 0..T-1 marked as ignored."""
    positions = positions.reshape(-1).to(logits.device)
    outside = (positions < 0) | (positions >= logits.shape[-1])
    return positions.masked_fill(outside, IGNORE_INDEX)


class NemotronForTokenClassification(NemotronPreTrainedModel):
    """One label per token."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels  # type: ignore[assignment]
        self.model = NemotronModel(config)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.score = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Scores (B, T, C); other arguments as of `NemotronModel.forward`.

        Args:
            labels: (B, T), of any strides. C > 1: integers below C, cross-entropy. C = 1: numbers, mean squared
                error. -100 is left out of either.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        return TokenClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels.to(logits.device), num_items),  # type: ignore[arg-type]
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        if self.num_labels > 1:
            check_ids(labels, self.num_labels, "labels", ignore=IGNORE_INDEX)
            return cross_entropy(logits, labels, num_items)
        labels = labels.reshape(logits.shape[:-1])
        counted = labels != IGNORE_INDEX
        squares = F.mse_loss(logits.squeeze(-1).float(), labels.float(), reduction="none")
        divisor = counted.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
        return (squares * counted).sum() / divisor.clamp(min=1)
