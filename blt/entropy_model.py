"""The entropy model: a small causal byte transformer whose next-byte entropy decides where patches start.

In: byte ids [B,T]. Out: logits [B,T,V]; entropies in nats. `document_entropies` runs whole documents of any length:
short ones share a row, long ones stream through with the window's keys and values carried over.
Source: arXiv 2412.09871. Shapes: B rows, T positions, V vocabulary, D width, n bytes of a document.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from blt.attention import documents_from_eos
from blt.decoding_cache import RowReader
from blt.errors import ConfigError
from blt.layers import Block, Context, Memory, RMSNorm, TransformerConfig, context, init_blocks, init_linear
from blt.vocabulary import BOS, EOS, VOCABULARY_SIZE, encode

STREAM_BYTES = 8192
"""Rotary positions of a document start again at each multiple of this (after the carried window), so that they stay
small enough for float32 angles and are a function of the place in the document alone."""

ROWS_AT_ONCE = 8
"""Rows that a GPU reads together: starting the kernels for one takes longer than they run. A CPU reads one, which stays
in its caches."""

Measure = Callable[[Tensor, Tensor], Tensor]
"""Logits [T,V] and the ids [T] that come next in, one value, or a row of them, for each position [T, ...] out."""


@dataclass(frozen=True, kw_only=True)
class EntropyModelConfig:
    """Shape of the entropy model. The published one is width 768, 14 layers, 12 heads (99,512,064 parameters)."""

    transformer: TransformerConfig

    def __post_init__(self) -> None:
        if self.transformer.window is None:
            raise ConfigError("transformer.window must be set for an entropy model: long documents stream through it")

    @property
    def window(self) -> int:
        """Positions that a position sees in one layer, itself included."""
        assert self.transformer.window is not None
        return self.transformer.window


class EntropyModel(nn.Module):
    """Embedding -> pre-norm blocks -> RMSNorm -> linear, untied and bias-free."""

    def __init__(self, config: EntropyModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = config.transformer
        self.byte_embedding = nn.Embedding(VOCABULARY_SIZE, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width, shape.norm_eps)
        self.output = nn.Linear(shape.width, VOCABULARY_SIZE, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights as the published implementation draws them."""
        init_linear(self.byte_embedding.weight)
        init_blocks(self.blocks, self.config.transformer)
        nn.init.ones_(self.norm.weight)
        init_linear(self.output.weight)

    def forward(self, byte_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of the next byte, float32 or wider.

        document_ids_BT: int64, constant and contiguous per document (-1 = padding); a document sees itself only and
        its positions start at 0. None: an EOS closes a document and positions run along the row, as the reference.
        """
        return self.logits(byte_ids_BT, self.places(byte_ids_BT, document_ids_BT))

    def places(self, byte_ids_BT: Tensor, document_ids_BT: Tensor | None = None) -> Context:
        """What the bytes of a batch see; arguments as of `forward`."""
        if document_ids_BT is not None:
            return context(self.config.transformer, document_ids_BT)
        positions = torch.arange(byte_ids_BT.shape[1], device=byte_ids_BT.device).expand_as(byte_ids_BT)
        return context(self.config.transformer, documents_from_eos(byte_ids_BT), positions)

    def logits(self, byte_ids_BT: Tensor, memory: Memory) -> Tensor:
        """Logits [B,T,V] of bytes that see what the memory holds."""
        x = self.byte_embedding(byte_ids_BT)
        for layer, block in enumerate(self.blocks):
            x = block(x, memory, layer)
        logits: Tensor = self.output(self.norm(x))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def next_byte_entropy(logits: Tensor) -> Tensor:
    """-sum p ln p over the last dimension, in nats, float32; all 260 ids count."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    terms: Tensor = torch.special.entr(torch.softmax(wide, -1))
    return terms.sum(-1).float()


class ContextStream:
    """Contexts read piece by piece side by side, each piece after the keys and values of the window before it."""

    def __init__(self, model: EntropyModel, num_contexts: int = 1) -> None:
        self.model = model
        self.position = 0
        """Ids of each context read so far."""
        self.reader = RowReader(model.config.transformer, num_contexts)

    def feed(self, ids_BT: Tensor) -> Tensor:
        """Logits [B,T,V] at the ids (on the model's device) that follow those fed before."""
        room = STREAM_BYTES - self.position % STREAM_BYTES
        pieces = [ids_BT[:, :room], *ids_BT[:, room:].split(STREAM_BYTES, 1)]
        return torch.cat([self._step(piece_BT) for piece_BT in pieces if piece_BT.numel()], 1)

    def keep(self, num_contexts: int) -> None:
        """Only the first contexts go on."""
        self.reader.keep(num_contexts)

    def _step(self, ids_BT: Tensor) -> Tensor:
        """Logits of a piece that crosses no multiple of STREAM_BYTES."""
        if starts_again(self.position):
            self.reader.position = self.model.config.window - 1
        memory = self.reader.chunk(ids_BT.shape[1], ids_BT.device)
        self.position += ids_BT.shape[1]
        return self.model.logits(ids_BT, memory)


def starts_again(position: int) -> bool:
    """Whether the rotary positions start again, after the carried window, where a context has read so many ids."""
    return position > 0 and position % STREAM_BYTES == 0


@torch.inference_mode()
def document_entropies(
    model: EntropyModel, documents: Sequence[bytes], *, reset_on_newline: bool = False, row_bytes: int = STREAM_BYTES
) -> list[Tensor]:
    """Entropies of each document, float32 [n + 1] in nats on the CPU: index 0 made at BOS, index i at byte i - 1.

    With `reset_on_newline` a newline byte opens a new context. A document's entropies depend on the document, the
    model and the reset alone (to 1e-4 nats in float32), not on the other documents or on `row_bytes`.
    """
    return _measured(model, documents, lambda logits, _: next_byte_entropy(logits), reset_on_newline, row_bytes)


@torch.inference_mode()
def document_nats(
    model: EntropyModel, documents: Sequence[bytes], *, reset_on_newline: bool = False, row_bytes: int = STREAM_BYTES
) -> list[Tensor]:
    """What each byte and the EOS of each document cost, -ln p, float32 [n + 1] in nats on the CPU; n is the EOS.

    The contexts are those of `document_entropies`: a value and the entropy of the same index are of one distribution.
    """
    return _measured(model, documents, _next_byte_nats, reset_on_newline, row_bytes)


@torch.inference_mode()
def document_entropies_and_nats(
    model: EntropyModel, documents: Sequence[bytes], *, reset_on_newline: bool = False, row_bytes: int = STREAM_BYTES
) -> list[tuple[Tensor, Tensor]]:
    """What `document_entropies` and `document_nats` give for each document, from one pass of the model."""
    both = _measured(model, documents, _entropy_and_nats, reset_on_newline, row_bytes)
    return [(values[:, 0], values[:, 1]) for values in both]


def _entropy_and_nats(logits: Tensor, next_ids: Tensor) -> Tensor:
    return torch.stack((next_byte_entropy(logits), _next_byte_nats(logits, next_ids)), -1)


def _next_byte_nats(logits: Tensor, next_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits, next_ids, reduction="none").float()


def _measured(
    model: EntropyModel, documents: Sequence[bytes], measure: Measure, reset_on_newline: bool, row_bytes: int
) -> list[Tensor]:
    """What `measure` makes of the logits at BOS and at each byte of each document: [n + 1, ...] on the CPU."""
    if row_bytes < 1:
        raise ValueError(f"row_bytes must be at least 1, got {row_bytes}")
    row_bytes, device = min(row_bytes, STREAM_BYTES), model.output.weight.device
    runs, num_ids = list[Run](), 0
    for document in documents:
        for pairs_2T in _contexts(document, reset_on_newline):
            runs.append(Run(num_ids, pairs_2T))
            num_ids += pairs_2T.shape[1]
    rows, streams = _rows(runs, row_bytes)
    at_once = _rows_at_once(device)
    values = torch.empty(0)
    for begin, found in chain(
        *(_packed(model, rows[i : i + at_once], measure) for i in range(0, len(rows), at_once)),
        *(_streamed(model, streams[i : i + at_once], row_bytes, measure) for i in range(0, len(streams), at_once)),
    ):
        if not len(values):
            # Filled in place: small parts that are kept between the logits of one chunk and those of the next
            # fragment the heap; a document of 3 MB took 3 GB. On the device, which need not be waited for then.
            values = found.new_empty((num_ids, *found.shape[1:]))
        values[begin : begin + len(found)] = found
    return list(values.cpu().split([len(document) + 1 for document in documents]))


def _rows_at_once(device: torch.device) -> int:
    return ROWS_AT_ONCE if device.type == "cuda" else 1


@dataclass(frozen=True)
class Run:
    """What the model reads as one context."""

    begin: int
    """Its first value's place among those of all documents."""
    pairs_2T: Tensor
    """Ids, and the ids that come next."""

    def __len__(self) -> int:
        return self.pairs_2T.shape[1]


def _contexts(document: bytes, reset_on_newline: bool) -> Iterator[Tensor]:
    """The runs that a model reads as one context, ids and next ids [2, n]: BOS and the bytes, or one per line opening
    with its newline."""
    ids = torch.cat((torch.tensor([BOS]), encode(document), torch.tensor([EOS])))
    pairs = torch.stack((ids[:-1], ids[1:]))
    if not reset_on_newline:
        yield pairs
        return
    newlines = (torch.nonzero(pairs[0] == encode(b"\n")).flatten()).tolist()
    yield from pairs.tensor_split(newlines, dim=1)


def _rows(runs: Sequence[Run], row_bytes: int) -> tuple[list[list[Run]], list[Run]]:
    """Rows of consecutive runs that fit one together; and the runs that are longer than a row, the longest first."""
    rows, streams, used = list[list[Run]](), list[Run](), row_bytes
    for run in runs:
        if len(run) > row_bytes:
            streams.append(run)
            used = row_bytes  # what follows it opens a row
        elif used + len(run) > row_bytes:
            rows.append([run])
            used = len(run)
        else:
            rows[-1].append(run)
            used += len(run)
    return rows, sorted(streams, key=len, reverse=True)


def _packed(model: EntropyModel, rows: Sequence[Sequence[Run]], measure: Measure) -> Iterator[tuple[int, Tensor]]:
    """Where the values of each row begin, and they: [n, ...]."""
    lengths = [torch.tensor([len(run) for run in row]) for row in rows]
    documents = [torch.arange(len(row)).repeat_interleave(of) for row, of in zip(rows, lengths, strict=True)]
    document_ids_RT = pad_sequence(documents, batch_first=True, padding_value=-1)
    pieces = [torch.cat([run.pairs_2T for run in row], 1) for row in rows]
    values_RT = _values(pieces, lambda ids_RT: model(ids_RT, document_ids_RT.to(ids_RT.device)), model, measure)
    for row, piece, values_T in zip(rows, pieces, values_RT, strict=True):
        yield row[0].begin, values_T[: piece.shape[1]]


def _streamed(
    model: EntropyModel, runs: Sequence[Run], row_bytes: int, measure: Measure
) -> Iterator[tuple[int, Tensor]]:
    """Where the values of each chunk of each run begin, and they: [n, ...]. The longest run comes first."""
    stream, going = ContextStream(model, len(runs)), list(runs)
    for first in range(0, len(runs[0]), row_bytes):
        going = [run for run in going if len(run) > first]
        stream.keep(len(going))
        pieces = [run.pairs_2T[:, first : first + row_bytes] for run in going]
        # A piece that others outlast is the last of its run: nothing reads what the padding after it leaves behind.
        values_RT = _values(pieces, stream.feed, model, measure)
        for run, piece, values_T in zip(going, pieces, values_RT, strict=True):
            yield run.begin + first, values_T[: piece.shape[1]]


def _values(
    pieces: Sequence[Tensor], logits_of: Callable[[Tensor], Tensor], model: EntropyModel, measure: Measure
) -> Tensor:
    """Values [R,T,...] of ids and next ids [2,T], padded to the longest."""
    pairs_RT2 = pad_sequence([pairs_2T.t() for pairs_2T in pieces], batch_first=True)
    ids_RT, next_ids_RT = pairs_RT2.to(model.output.weight.device, non_blocking=True).unbind(-1)
    logits_RTV = logits_of(ids_RT)
    values_RT: Tensor = measure(logits_RTV.flatten(0, 1), next_ids_RT.flatten()).unflatten(0, ids_RT.shape)
    return values_RT
