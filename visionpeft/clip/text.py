"""The frozen text tower as a function of prompts: exact, and without the work that cannot matter.

CLIP's text tower is causal and is read at the end token. So positions after the end token cannot matter, and tokens
before the class name that are the same for all classes give the same keys and values for all of them. `encode`
runs those shared tokens once, lets the remaining tokens of every class attend to their keys and values, packs classes
of different lengths one after the other instead of padding them, and in the last block follows the end tokens alone.
Features and gradients are those of running every class in full. Towers for which this does not hold (not causal, pooled
elsewhere, adapters that insert tokens) are run in full, as the library does it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip import CLIP
from open_clip.transformer import CustomResidualAttentionBlock, ResidualAttentionBlock, TextTransformer
from torch.utils.checkpoint import checkpoint

from visionpeft.backbones.attention import attend
from visionpeft.backbones.open_clip import join_heads, project, residual_block
from visionpeft.clip.layout import Layout, Tokens
from visionpeft.clip.packing import Bucket, Chunk, OwnTokens, Packing, Rows, common_length, padded
from visionpeft.errors import UnsupportedError
from visionpeft.sites import TOKEN_SITES, Sites, is_drawn


class TextEncoder:
    """Text features of prompts from the text tower of an OpenCLIP model.

    Args:
        clip: the model. Adapters attached to its text tower act here, too.

    Raises:
        UnsupportedError: the text tower is not one of OpenCLIP's own.
    """

    def __init__(self, clip: nn.Module):
        module = getattr(clip, "text", clip)
        if not isinstance(module, CLIP | TextTransformer):
            raise UnsupportedError(
                f"prompts need an OpenCLIP model with a text tower of OpenCLIP's own, not {type(module).__name__}"
            )
        self.clip = clip
        self.module = module
        self.pool = module.text_pool_type if isinstance(module, CLIP) else module.pool_type
        self.blocks = list(module.transformer.resblocks)
        self.width = module.token_embedding.embedding_dim
        self.length = module.context_length
        self._not_causal = _why_not_causal(module, self.pool)

    @property
    def num_features(self) -> int:
        """Number of features of a text, and of an image."""
        projection = self.module.text_projection
        if projection is None:
            return self.width
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the token stream."""
        return self.module.transformer.get_cast_dtype()

    @property
    def device(self) -> torch.device:
        """Where the tower lives."""
        return self.module.positional_embedding.device

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Token embeddings (tokens, width) of token ids."""
        return self.module.token_embedding(torch.tensor(ids, dtype=torch.long, device=self.device)).detach()

    def unseen(self, tokens: Tokens) -> bool:
        """Whether one of the tokens has an embedding of zeros: it was not among the texts the tower was trained on."""
        ids = [token for token in tokens if token >= 0]
        return self.device.type != "meta" and bool((self.embed(ids) == 0).all(dim=-1).any())

    def encode(
        self,
        layout: Layout,
        context: torch.Tensor | None = None,
        *,
        chunk_size: int | None = None,
        fast: bool = True,
        own: OwnTokens | None = None,
    ) -> torch.Tensor:
        """Text features (groups, texts, features), not normalised.

        Args:
            layout: the texts.
            context: context vectors (groups, vectors, width) for the slots of the texts. Each group, for instance one
                image, has its own vectors and gives its own features of all texts. None if there are no slots.
            chunk_size: run this many texts at a time, and run them again for the gradient: less memory, same gradient.
            fast: skip what cannot matter where that is exact; False runs every text in full.
            own: tokens that each text has for itself from a block on. Up to there the texts share the tokens that they
                overwrite, from there on only what is before them.
        """
        if not fast or self.why_in_full(layout, own) is not None:
            return self._encode_in_full(layout, context, chunk_size, own)
        most = None if own is None else own.stop
        packing = Packing.of(layout, self._may_share(), chunk_size, self.device, most)
        keys_and_values = self._run_shared(packing, context, own)
        chunked = len(packing.chunks) > 1 and torch.is_grad_enabled()
        features = []
        for chunk, texts in zip(packing.chunks, packing.texts, strict=True):
            tokens = None if own is None else own.of(texts)
            arguments = (chunk, context, tokens, *(tensor for pair in keys_and_values for tensor in pair))
            run = self._run_chunk
            features.append(checkpoint(run, *arguments, use_reentrant=False) if chunked else run(*arguments))
        return torch.cat(features, dim=1)[:, packing.restore]

    def why_in_full(self, layout: Layout, own: OwnTokens | None = None) -> str | None:
        """Why every text of the layout has to be run in full, or None if it need not."""
        if self._not_causal is not None:
            return self._not_causal
        for module in self._acting_parts():
            if is_drawn(module) and not isinstance(module, nn.Dropout):
                return f"{type(module).__name__} is drawn for whole texts"
        replaced = 0
        for block in self.blocks:
            sites: Sites | None = getattr(block, "sites", None)
            for module in () if sites is None else sites.acting.get("kv", ()):
                # keys before a text are among those the texts share, unless they depend on the text
                if not hasattr(module, "num_tokens") or getattr(module, "reads_attention_input", False):
                    return f"{type(module).__name__} acts on the keys of whole texts"
            for site, module in _token_modules(sites):
                if site == "stream_in" and hasattr(module, "replaced_tokens"):
                    replaced = max(replaced, module.replaced_tokens[1])
                elif not getattr(module, "tokenwise", False):
                    return f"{type(module).__name__} acts on whole texts"
        if own is not None and replaced:
            return "tokens are overwritten twice"
        replaced = replaced if own is None else own.stop
        if replaced and (not self._may_share() or common_length(layout.texts) < replaced):
            return "tokens are replaced that the texts do not share"
        return None

    def _may_share(self) -> bool:
        """Whether no dropout is drawn, which every text would draw for itself."""
        return not any(is_drawn(module) for module in self._acting_parts())

    def _acting_parts(self) -> Iterator[nn.Module]:
        """Everything inside the modules that act somewhere in the tower."""
        for part in (*self.blocks, self.module.ln_final):
            for module in part.modules():
                sites = getattr(module, "sites", None)
                acting = [*getattr(module, "acting", ()), *getattr(module, "entering", ())]
                if sites is not None:
                    acting += [each for modules in sites.acting.values() for each in modules]
                    acting += [each for branches in sites.branches.values() for each, _ in branches]
                # Another object wraps a module for whole texts, which are run in full.
                for each in filter(lambda each: isinstance(each, nn.Module), acting):
                    yield from each.modules()

    def _embedded(self, rows: Rows, context: torch.Tensor | None) -> torch.Tensor:
        """Embedded tokens (groups, rows, width) with their positions."""
        with torch.no_grad():
            x = self.module.token_embedding(rows.ids).to(self.dtype)
            x.index_fill_(0, rows.learned_rows, 0)  # `x[...] = 0` would copy the zero to the device
            x = (x + self.module.positional_embedding[rows.positions].to(self.dtype))[None]
        if context is None:
            return x
        x = x.expand(len(context), -1, -1)
        if len(rows.learned_rows) == 0:
            return x
        return x.index_add(1, rows.learned_rows, context[:, rows.learned_vectors].to(x.dtype))

    def _run_shared(
        self, packing: Packing, context: torch.Tensor | None, own: OwnTokens | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values (groups, heads, shared tokens, head width) of the shared tokens in every block.

        From the block on where texts have tokens of their own, only those before them are shared.
        """
        x = self._embedded(packing.shared, context)
        keys_and_values = []

        def attention(block: nn.Module, h: torch.Tensor) -> torch.Tensor:
            q, k, v = project(block.attn, h)
            sites = getattr(block, "sites", None)
            k, v = (k, v) if sites is None else sites.kv(k, v, h)
            keys_and_values.append((k, v))
            return join_heads(block.attn, attend(q, k, v, is_causal=True))

        for index, block in enumerate(self.blocks[:-1]):
            x = x[:, : own.first] if own is not None and index == own.block else x
            x = residual_block(block, x, _acting(block), lambda h, block=block: attention(block, h))
        last = self.blocks[-1]
        x = x[:, : own.first] if own is not None and own.block == len(self.blocks) - 1 else x
        at = _acting(last)
        # After the keys and values of the last block nothing of the shared tokens is read.
        attention(last, at("attn_in", last.ln_1(at("stream_in", x))))
        return keys_and_values

    def _run_chunk(
        self, chunk: Chunk, context: torch.Tensor | None, own: OwnTokens | None, *keys_and_values: torch.Tensor
    ) -> torch.Tensor:
        """Features (groups, texts of the chunk, features)."""
        x = self._embedded(chunk, context)
        buckets, ends = chunk.buckets, chunk.ends
        shared = list(zip(keys_and_values[::2], keys_and_values[1::2], strict=True))
        for index, (block, (keys, values)) in enumerate(zip(self.blocks, shared, strict=True)):
            if own is not None and index == own.block:
                x, buckets, ends = chunk.with_own(x, own.tokens)
            sites: Sites | None = getattr(block, "sites", None)
            # A branch that starts before the attention and ends after it needs all tokens on the way.
            ends_only = block is self.blocks[-1] and not (sites is not None and sites.branches)

            def attention(h, block=block, keys=keys, values=values, ends_only=ends_only, buckets=buckets):
                q, k, v = project(block.attn, h)
                # Split and not sliced: the gradient of a slice is as large as the whole.
                sizes = [bucket.count * bucket.length for bucket in buckets]
                parts = zip(buckets, *(x.split(sizes, dim=2) for x in (q, k, v)), strict=True)
                attended = [_attend_bucket(*own, keys, values, bucket, ends_only) for bucket, *own in parts]
                return join_heads(block.attn, torch.cat(attended, dim=2))

            at = _acting(block, replacing=False)
            x = residual_block(block, x, at, attention, ends if ends_only else None)
        return self.to_features(self.module.ln_final(x if ends_only else x[:, ends]))

    def to_features(self, x: torch.Tensor) -> torch.Tensor:
        """The projection of normalised tokens (..., width) into the space of the features, (..., features)."""
        projection = self.module.text_projection
        if projection is None:
            return x
        return projection(x) if isinstance(projection, nn.Linear) else x @ projection

    def _encode_in_full(
        self, layout: Layout, context: torch.Tensor | None, chunk_size: int | None, own: OwnTokens | None
    ) -> torch.Tensor:
        """The library's own `encode_text`, with the context vectors in the place of the embeddings of their slots."""
        groups = 1 if context is None else len(context)
        chunks = padded(layout, chunk_size, self.device)
        chunked = len(chunks) > 1 and torch.is_grad_enabled()
        features = []
        for group in range(groups):
            vectors = None if context is None else context[group]
            texts = [None] * len(chunks) if own is None else own.tokens.split([len(chunk) for chunk in chunks])
            for chunk, tokens in zip(chunks, texts, strict=True):
                arguments = (chunk, vectors, None if own is None else replace(own, tokens=tokens))
                run = self._library_features
                features.append(checkpoint(run, *arguments, use_reentrant=False) if chunked else run(*arguments))
        return torch.cat(features).unflatten(0, (groups, len(layout)))

    def _library_features(
        self, tokens: torch.Tensor, context: torch.Tensor | None, own: OwnTokens | None
    ) -> torch.Tensor:
        # In the slots stands an id that is neither padding, which CoCa masks, nor the end, nor larger than that.
        special = [getattr(self.module, name, None) for name in ("pad_id", "eos_id", "text_eos_id")]
        word = next(each for each in range(4) if each not in special)
        with (
            _embedded_slots(self.module.token_embedding, tokens, context),
            contextlib.nullcontext() if own is None else self._overwritten(own),
        ):
            return self.clip.encode_text(tokens.where(tokens >= 0, word), normalize=False)

    @contextmanager
    def _overwritten(self, own: OwnTokens) -> Iterator[None]:
        """Within the context, a block reads the own tokens of texts in the place of those that come to it."""

        def overwrite(block: nn.Module, inputs: tuple) -> tuple:
            x, *others = inputs
            return torch.cat((x[:, : own.first], own.tokens.to(x.dtype), x[:, own.stop :]), dim=1), *others

        if not getattr(self.module.transformer, "batch_first", True):
            raise UnsupportedError("tokens of each text's own need an OpenCLIP text tower with batch_first=True")
        handle = self.blocks[own.block].register_forward_pre_hook(overwrite)
        try:
            yield
        finally:
            handle.remove()


def _why_not_causal(module: nn.Module, pool: str) -> str | None:
    """Why the end token's feature of a text tower depends on more than the tokens up to it, or None."""
    if pool not in ("argmax", "eos"):
        return f"it is read at the {pool} token"
    if getattr(module, "cls_emb", None) is not None:
        return "a class token is after the text"
    if not is_causal(module):
        return "it is not causal"
    for block in module.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock | CustomResidualAttentionBlock):
            return f"its blocks are of class {type(block).__name__}"
    return None


def is_causal(module: nn.Module) -> bool:
    """Whether each token of a text tower sees those before it, and none after."""
    mask = module.attn_mask
    return mask is not None and (mask.is_meta or torch.equal(mask, torch.full_like(mask, float("-inf")).triu_(1)))


def unit(features: torch.Tensor) -> torch.Tensor:
    """Features of length 1, at least in float32."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


@contextmanager
def _embedded_slots(embedding: nn.Embedding, tokens: torch.Tensor, context: torch.Tensor | None) -> Iterator[None]:
    """Within the context, the embedding gives context vectors (vectors, width) where `tokens` has slots."""

    def insert(module: nn.Module, inputs: tuple, embedded: torch.Tensor) -> torch.Tensor:
        vectors = context.to(embedded.dtype)[(-1 - tokens).clamp(min=0)]
        return torch.where((tokens < 0)[..., None], vectors, embedded)

    if context is None:
        yield
        return
    handle = embedding.register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


def _token_modules(sites: Sites | None) -> Iterator[tuple[str, nn.Module]]:
    """What acts on tokens in a block, with its site."""
    if sites is None:
        return
    for site in TOKEN_SITES:
        yield from ((site, module) for module in sites.acting.get(site, ()))
        yield from ((site, module) for module, _ in sites.branches.get(site, ()))


def _acting(block: nn.Module, replacing: bool = True):
    """What acts at the token sites of a block; without what replaces tokens if they are not among the tokens."""
    sites: Sites | None = getattr(block, "sites", None)
    if sites is None:
        return lambda site, x: x
    if replacing or not any(hasattr(module, "replaced_tokens") for _, module in _token_modules(sites)):
        return sites.enter()
    return sites.without(lambda module: hasattr(module, "replaced_tokens")).enter()


def _attend_bucket(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    shared_keys: torch.Tensor,
    shared_values: torch.Tensor,
    bucket: Bucket,
    ends_only: bool,
) -> torch.Tensor:
    """softmax(q [K; k]^T / sqrt(d) + causal) [V; v] for the texts of a bucket, which share K and V.

    q, k and v (groups, heads, rows of the bucket, d) -> the same shape; of each text only the end token if `ends_only`.
    """
    count, length, num_shared = bucket.count, bucket.length, shared_keys.shape[2]
    q, k, v = (x.unflatten(2, (count, length)) for x in (q, k, v))
    if ends_only:
        q = q[:, :, :, -1:]
    queries = q.shape[3]
    to_shared = (q.flatten(2, 3) @ shared_keys.mT).unflatten(2, (count, queries))
    scores = torch.cat((to_shared, q @ k.mT), dim=-1) * q.shape[-1] ** -0.5
    if queries > 1:
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(F.pad(future, (num_shared, 0)), float("-inf"))
    weights = scores.softmax(dim=-1).to(v.dtype)
    on_shared, on_own = weights.split((num_shared, length), dim=-1)
    return on_shared.flatten(2, 3) @ shared_values + (on_own @ v).flatten(2, 3)
