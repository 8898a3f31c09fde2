"""Heads on the Nemotron decoder: language model, sequence classification, question answering, token classification.

Letters of shapes: B batch, T tokens, D hidden, V vocabulary, C labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from . import framework
from .cache import LegacyCache, from_legacy, to_legacy
from .config import NemotronConfig
from .engine_hook import EngineDecoding
from .framework import CACHE_NAME, can_return_tuple
from .model import NemotronModel, NemotronPreTrainedModel, check_ids
from .ops.loss import CHUNK_VALUES, IGNORE_INDEX, cross_entropy, linear_cross_entropy, shift_labels
from .outputs import DeferredLogitsOutput, kept_positions, one_of
from .written_code import record


class NemotronForCausalLM(NemotronPreTrainedModel, EngineDecoding, GenerationMixin):  # type: ignore[override]
    """The language model: token ids to scores of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__(config)
        self.model = NemotronModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        cache_position: Tensor | None = None,
        num_logits_to_keep: int | Tensor = 0,
        logits_to_keep: int | Tensor = 0,
        **loss_kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token, and the loss where labels are given; arguments as of `NemotronModel.forward` and

        Args:
            labels: (B, T), not shifted; -100 is ignored. The loss is over all positions whatever is kept. With no
                label but -100 it is 0, with a zero gradient.
            num_logits_to_keep, logits_to_keep: two names of one argument. n keeps the last n positions' logits,
                0 keeps all, a tensor names positions.
            **loss_kwargs: `num_items_in_batch` divides the summed loss; `shift_labels` are labels already shifted;
                the rest goes to the attention function.

        Returns:
            `loss` (fp32 scalar), `logits` (B, kept, V), `past_key_values`, `hidden_states`, `attentions`. When
            labels are given and the logits would be large they are computed only if read.
        """
        keep = one_of(num_logits_to_keep, logits_to_keep)
        num_items = loss_kwargs.pop("num_items_in_batch", None)
        targets = loss_kwargs.pop("shift_labels", None)
        # What is left in loss_kwargs (sequence lengths, paged caches) goes to the attention function.
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
            cache_position=cache_position,
            **loss_kwargs,
        )
        hidden: Tensor = outputs.last_hidden_state
        fields = {name: outputs.get(name) for name in (CACHE_NAME, "hidden_states", "attentions")}
        if labels is None and targets is None:
            logits = self.lm_head(kept_positions(hidden, keep))  # type: ignore[arg-type]
            return CausalLMOutputWithPast(logits=logits, **fields)
        if "_loss_function" in self.__dict__:  # somebody set a loss of their own
            logits = self.lm_head(hidden)
            loss = self.loss_function(
                logits, labels, self.vocab_size, num_items_in_batch=num_items, shift_labels=targets
            )
            return CausalLMOutputWithPast(loss=loss, logits=kept_positions(logits, keep), **fields)  # type: ignore[arg-type]
        if labels is not None:
            check_ids(labels, self.lm_head.out_features, "labels", ignore=-100)
        if targets is None:
            targets = shift_labels(labels)  # type: ignore[arg-type]
        return self._with_loss(hidden, targets.to(hidden.device), num_items, keep, fields)

    def _with_loss(
        self, hidden: Tensor, targets: Tensor, num_items: Any, keep: int | Tensor, fields: dict[str, Any]
    ) -> CausalLMOutputWithPast:
        small = targets.numel() * self.lm_head.out_features <= CHUNK_VALUES
        if small or torch.compiler.is_compiling() or not _is_plain(self.lm_head):
            logits = self.lm_head(hidden)
            loss = cross_entropy(logits, targets, num_items)
            return CausalLMOutputWithPast(loss=loss, logits=kept_positions(logits, keep), **fields)  # type: ignore[arg-type]
        loss = linear_cross_entropy(hidden, self.lm_head.weight, targets, num_items)
        kept = kept_positions(hidden, keep)  # type: ignore[arg-type]
        return DeferredLogitsOutput.of(lambda: self.lm_head(kept), loss=loss, **fields)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As `EngineDecoding.generate`; a legacy tuple as `past_key_values` is accepted, and comes back as one."""
        kwargs = framework.with_framework_name(kwargs)
        past = kwargs.get(CACHE_NAME)
        if not isinstance(past, tuple | list):
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        kwargs[CACHE_NAME] = from_legacy(past, self.config.num_hidden_layers)
        out = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        if getattr(out, CACHE_NAME, None) is not None:
            setattr(out, CACHE_NAME, to_legacy(getattr(out, CACHE_NAME)))
        return out


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
                error. -100 is ignored in both.
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


def _is_plain(head: nn.Module) -> bool:
    """Whether `head` is just its weight: no adapter, quantizer, offloading hook or sharding changes the product."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight.data) is Tensor
        and not head._forward_hooks
        and not head._forward_pre_hooks
        and not hasattr(head, "_hf_hook")
    )


record(__name__)  # what the engine computes; see there
