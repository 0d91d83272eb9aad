"""The model as Hugging Face transformers loads it: `skc export --format hf` makes a folder's modelling file of this.

Nothing of ours imports this file. It is put behind all that it needs of ours, into one module that imports none.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from backends.cuda.model import Model as Trunk
from core.model.client import model_of_spec
from core.model.context import Constants, each_array
from core.model.tables import mixer_tables, rope_tables


class SKCConfig(PretrainedConfig):
    """What config.json says: `spec` holds the settings of the model, the other fields what transformers asks for."""

    model_type = "skc"

    def __init__(self, spec=None, **others):
        self.spec = spec or {}
        super().__init__(**others)


class TextState(NamedTuple):
    """A place in the texts of a batch: what the model needs of everything before it."""

    model: Any
    position: Any  # (B,) int64 on the host: tokens so far


@dataclass
class SKCOutput(ModelOutput):
    """What a forward pass returns."""

    loss: Any = None
    logits: Any = None  # (B, T, V) float32
    state: Any = None  # TextState, if it was asked for


class SKCForCausalLM(PreTrainedModel, GenerationMixin):
    """Tokens to logits. A BOS token begins a document, which sees nothing of what came before it."""

    config_class = SKCConfig
    base_model_prefix = "model"
    _is_stateful = True  # a state is no list of keys and values, and cannot be cut
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self._settings = model_of_spec(config.spec)
        self.model = Trunk(self._settings, False)
        self._tables = {}
        self.post_init()

    def _init_weights(self, module):
        """Leave the weights: they are those of the file."""

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def get_input_embeddings(self):
        """Return the vectors of tokens, which the head multiplies too."""
        return self.model.embed

    def forward(self, input_ids, attention_mask=None, state=None, labels=None, use_cache=None, **options):
        """Return SKCOutput: logits, the loss if there are `labels` (-100: none), and a state if `use_cache`.

        `options` are those of the loss, `num_items_in_batch` say, by which Trainer divides; others are passed over.
        `state`: that of the pass before, whose texts go on. Tokens where the mask is 0 are not read, wherever they are.
        """
        (rows, seq), device = input_ids.shape, input_ids.device
        read = torch.full((rows,), seq, device=device)
        mask = None if attention_mask is None else attention_mask[:, -seq:] != 0
        if mask is not None and bool(mask.all()):
            mask = None
        if mask is not None:  # tokens that are read come first: a text's places and blocks count from its own start
            order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
            input_ids, read = torch.gather(input_ids, 1, order), mask.sum(dim=1)
        if state is None and use_cache:
            state = TextState(self.model.start(rows, device), torch.zeros(rows, dtype=torch.int64))
        tables = self.constants(seq, device, None if state is None else state.position)
        dtype = self.model.embed.weight.dtype
        logits, tape = self.model(input_ids, tables, dtype, state=None if state is None else state.model)
        if state is not None:
            kept = state.model.kept
            model = self.model.commit(tape, read, 0 if kept is None else kept.shape[1] + seq)
            state = TextState(model, state.position + read.cpu())
        if mask is not None:
            # `generate` takes the logits of the last place: where that is padding, the text's last token speaks there.
            back = torch.minimum(torch.argsort(order, dim=1), read[:, None] - 1).clamp(min=0)
            logits = torch.gather(logits, 1, back[..., None].expand(logits.shape))
        loss = None
        if labels is not None:
            if mask is not None:  # padding predicts nothing
                labels = labels.to(device).masked_fill(~torch.nn.functional.pad(mask[:, :-1], (1, 0)), -100)
            loss = self.loss_function(logits, labels, self._settings.vocab, **options)
        return SKCOutput(loss=loss, logits=logits, state=state)

    def constants(self, seq, device, position=None):
        """Return the tables of rows from `position` (B,) on; None: from 0."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if (device, wide) not in self._tables:
            self._tables = {(device, wide): [_table(x, wide, device) for x in mixer_tables(self._settings)]}
        own, attends = self._settings.attention, self._settings.mixes("attention")
        first = None if position is None else position.numpy()
        cos, sin = rope_tables(seq, own.rope_dims if attends else 0, own.rope_base, first)
        made = Constants(_table(cos, wide, device), _table(sin, wide, device), *self._tables[device, wide])
        return made if position is None else made._replace(position=position.to(device))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, state=None, use_cache=True, **ignored):
        """Return what `generate` gives `forward`: with a state only the last token."""
        tokens = input_ids if state is None else input_ids[:, -1:]
        return {"input_ids": tokens, "attention_mask": attention_mask, "state": state, "use_cache": use_cache}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **options):
        """Hand the state on to the next pass of `generate`."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **options)
        return model_kwargs | {"state": outputs.get("state")}

    def _reorder_cache(self, state, beam_idx):
        """Return the state of other rows, as beam search chooses them; None without one."""
        if state is None:
            return None
        model = each_array(state.model, lambda x: x.index_select(0, beam_idx.to(x.device)))
        return TextState(model, state.position.index_select(0, beam_idx.cpu()))


def _table(table, dtype, device):
    """Return a table of the host's on the device."""
    return torch.tensor(table, dtype=dtype, device=device)
