"""CLIP with class names: from images and prompts to logits, and what of that is learnt."""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Self

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from visionpeft.adapters.adapters import attached, has_adapters, known
from visionpeft.adapters.attach import attach
from visionpeft.adapters.described_tensors import check_tensors
from visionpeft.clip.building import checked, freeze
from visionpeft.clip.kept_features import Kept, KeptFeatures, state_of_texts
from visionpeft.clip.layout import Layout, Tokenizer, Tokens, check_read, clean_class_names
from visionpeft.clip.model import acting_adapters, check_acting, check_clip, check_images, image_dtype
from visionpeft.clip.packing import OwnTokens
from visionpeft.clip.template_ensemble import ensemble, template_layouts
from visionpeft.clip.templates import check_templates
from visionpeft.clip.text import TextEncoder, unit
from visionpeft.clip.token_order import attending_in_order
from visionpeft.errors import ConfigurationError, UnsupportedError
from visionpeft.methods.parts.base import Method


class PromptedCLIP(nn.Module):
    """logits = exp(logit_scale) * f t^T + logit_bias, with unit image and text features f and t.

    The CLIP model is frozen and stays in evaluation mode, but for what adapters have in it. What is learnt is float32,
    whatever the CLIP's precision. Arguments must be of the types that they are annotated with, and numbers finite, as
    fields of methods; what is refused leaves the CLIP as it was. How it is learnt is for `Learner` to say.

    Args:
        clip: an OpenCLIP model.
        tokenizer: its tokenizer, `open_clip.get_tokenizer(<name of the model>)`.
        class_names: names of the classes, in the order of the labels.
        options: the further arguments with which this learner can be built again.
        templates: the templates of `template_features`, none for a learner without them.
        allow_duplicates: accept two classes of one name.

    Attributes:
        frozen_images: image features do not depend on what is trained, so that they can be kept.
        class_bound: what is trained belongs to these very classes.
        reads_names: class names stand in its texts; otherwise they only name its outputs.
        adapter_name: name of the adapter that the learner attaches to its CLIP, None if it attaches none.
        adapted: it has attached its adapter.
        acting: the adapters of the CLIP with which this learner computes.
        chunk_size: most texts that are encoded at a time, None for all; less memory, the same gradient.
        fast_text: leave out the work in the text tower that cannot matter.

    Raises:
        UnsupportedError: the model is no CLIP, or its text tower takes no prompts.
        ConfigurationError: no tokenizer, or class names that cannot be used.
    """

    frozen_images = True
    class_bound = False
    reads_names = True
    adapter_name: str | None = None

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Callable,
        class_names: Sequence[str],
        *,
        options: dict,
        templates: str | Sequence[str] | None = None,
        allow_duplicates: bool = False,
    ):
        super().__init__()
        check_clip(clip)
        self.options = options
        self.allow_duplicates = allow_duplicates
        self.chunk_size: int | None = None
        self.fast_text = True
        self.text = TextEncoder(clip)
        self.tokenizer = Tokenizer(tokenizer, self.text.length)
        self.templates = () if templates is None else check_templates(templates)
        self.class_names: list[str] = []
        self._kept = KeptFeatures()
        self.clip = clip
        self.acting = acting_adapters(clip)
        self.adapted = False
        freeze(clip)

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)

    # Texts of the classes

    @abstractmethod
    def prompts(self, names: Sequence[str]) -> list[Tokens]:
        """Tokens and slots of the prompt of each class."""

    def context(self) -> torch.Tensor | None:
        """Context vectors (groups, vectors, width) for the slots of the prompts, None without slots."""
        return None

    def set_class_names(self, class_names: Sequence[str]) -> None:
        """Classify into other classes with what has been learnt; nothing is changed if the names are refused.

        Raises:
            ConfigurationError: names that cannot be used, or what was learnt belongs to the old classes.
        """
        names = clean_class_names(class_names, self.allow_duplicates)
        if self.class_bound and self.class_names and names != self.class_names:
            raise ConfigurationError(
                f"{type(self).__name__} has learnt something for each of its {len(self.class_names)} classes and takes "
                "no other class names; use a learner whose context is shared by all classes"
            )
        if self.reads_names:
            check_read(self.tokenizer, names, self.allow_duplicates)
        layout = self.tokenizer.layout(self.prompts(names), names)
        frozen_layouts = template_layouts(self.tokenizer, self.templates, names)
        for each in (layout, *frozen_layouts):
            self.text.check_end(each)
        pairs = zip(names, layout.texts, strict=True)
        if unseen := [name for name, text in pairs if self.tokenizer.unknown in text or self.text.unseen(text)]:
            warnings.warn(
                f"the text tower was never trained on words of {', '.join(map(repr, unseen[:5]))}"
                f"{' and others' if len(unseen) > 5 else ''}; expect little of these classes",
                stacklevel=2,
            )
        self.class_names, self.layout, self.frozen_layouts = names, layout, frozen_layouts
        self._kept.clear()

    layout: Layout
    frozen_layouts: list[Layout]

    def with_class_names(self, class_names: Sequence[str]) -> Self:
        """A learner with other class names and the same CLIP and values; this one keeps its names.

        Raises:
            ConfigurationError: as `set_class_names`.
        """
        view = self._view()
        view.set_class_names(class_names)
        return view

    def _view(self) -> Self:
        """This learner again, of the same tensors, in which what is set does not change this one."""
        view = copy.copy(self)
        for name in ("_parameters", "_buffers", "_modules"):  # a shallow copy would share these dicts
            vars(view)[name] = vars(self)[name].copy()
        for name, module in self._modules.items():
            if isinstance(module, PromptedCLIP):
                view._modules[name] = module._view()
        view._kept = KeptFeatures()  # text features belong to the class names
        return view

    def __deepcopy__(self, memo):
        """A learner of its own, with a CLIP of its own; the tokenizer, which does not change, is shared."""
        memo[id(self.tokenizer)] = self.tokenizer
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def set_template(self, template: str | Sequence[str]) -> None:
        """Use the template of a data set where the learner was given none.

        Learners without templates, and those whose templates are no option of theirs, ignore it.

        Raises:
            ConfigurationError: a template without {}, or one that makes a text too long; nothing is changed.
        """
        if self.templates and self.options.get("template", self.templates) is None:
            templates = check_templates(template)
            self.frozen_layouts = template_layouts(self.tokenizer, templates, self.class_names)
            self.templates = templates
            self._kept.clear()

    # Images to logits

    def check_acting(self) -> None:
        """Refuse to compute with other adapters than those with which this learner was built.

        Raises:
            ConfigurationError: others act on the CLIP now.
        """
        check_acting(self.clip, self.acting, type(self).__name__)

    def check_images(self, images: torch.Tensor) -> None:
        """Refuse images that the image tower does not take, and adapters that have been switched.

        Raises:
            ConfigurationError: no tensor of floating point numbers, another shape than (batch, 3, height, width),
                another size, or other adapters act.
        """
        check_images(self.clip, images)
        self.check_acting()

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Image features (batch, features) of images (batch, 3, height, width), not normalised.

        Raises:
            ConfigurationError: as `check_images`.
        """
        self.check_images(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_images):
            images = images.to(image_dtype(self.clip))
            with attending_in_order(self.clip.visual, images):
                return self.run_image_tower(images)

    def run_image_tower(self, images: torch.Tensor) -> torch.Tensor:
        """What the image tower gives of images that have been checked, not normalised."""
        return self.clip.encode_image(images, normalize=False)  # CoCa would

    def image_features(self, images: torch.Tensor) -> torch.Tensor:
        """Unit image features (batch, features) of images (batch, 3, height, width).

        Raises:
            ConfigurationError: as `encode_images`.
        """
        return unit(self.encode_images(images))

    def text_features(self) -> torch.Tensor:
        """Unit text features (classes, features); without gradients they are kept until what they depend on changes."""
        if torch.is_grad_enabled():
            return self.encode_text()
        return self.kept("text", self.encode_text, self.trained_state().values())

    def template_features(self) -> torch.Tensor:
        """Frozen unit text features (classes, features): the mean over the templates, normalised again."""
        return self.kept("templates", lambda: ensemble(self.text, self.frozen_layouts, self.chunk_size, self.fast_text))

    def encode_text(self) -> torch.Tensor:
        """Unit text features (classes, features), computed anew."""
        return unit(self.encode(self.layout, self.context()))[0]

    def encode(self, layout: Layout, context: torch.Tensor | None = None, own: OwnTokens | None = None) -> torch.Tensor:
        """Text features (groups, texts, features), not normalised, `chunk_size` texts at a time."""
        self.check_acting()

        def run(groups: torch.Tensor | None) -> torch.Tensor:
            return self.text.encode(layout, groups, chunk_size=self.chunk_size, fast=self.fast_text, own=own)

        if context is None or self.chunk_size is None or len(context) * len(layout) <= self.chunk_size:
            return run(context)
        parts = context.split(max(1, self.chunk_size // len(layout)))
        if len(parts) == 1 or len(layout) > self.chunk_size or not torch.is_grad_enabled():
            return torch.cat([run(part) for part in parts])
        return torch.cat([checkpoint(run, part, use_reentrant=False) for part in parts])

    def kept(
        self,
        key: str,
        compute: Callable[[], Kept],
        depends_on: Iterable[torch.Tensor] = (),
        with_graph: bool = False,
        adapters: Iterable[str] | None = None,
    ) -> Kept:
        """Features computed by `compute`, again only when something they depend on has changed.

        Of frozen tensors it is noticed that they were replaced or written to, but not through `.data`.

        Args:
            key: what the features are.
            compute: computes them.
            depends_on: tensors of the learner on whose values they depend, beside the CLIP and the class names.
            with_graph: compute them with gradients.
            adapters: the adapters of the CLIP that act when they are computed; by default those that act now.
        """
        if torch.compiler.is_exporting():  # what is computed then is no number, and nothing to keep
            with torch.set_grad_enabled(with_graph):
                return compute()
        state, trained = state_of_texts(self.clip, self.text, adapters)
        values = {id(tensor): tensor for tensor in (*trained, *depends_on)}
        state = (*state, self.training, self.fast_text)
        return self._kept.get(key, state, list(values.values()), compute, with_graph)

    def logits(self, image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
        """Scaled cosines (batch, classes) of unit features (batch, features) and (classes, features).

        They have the higher precision of the two: image features may have been kept in half.
        """
        dtype = torch.promote_types(image_features.dtype, text_features.dtype)
        # Autocast would round a hundred times a cosine to the eight bits of bfloat16.
        with torch.autocast(image_features.device.type, enabled=False):
            logits = self.scale.to(dtype) * image_features.to(dtype) @ text_features.to(dtype).mT
        return self.with_bias(logits)

    def with_bias(self, logits: torch.Tensor) -> torch.Tensor:
        """Scaled cosines with the bias of the CLIP, which SigLIP has."""
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias.to(logits.dtype)

    @property
    def scale(self) -> torch.Tensor:
        """exp(logit_scale) of the CLIP."""
        return self.clip.logit_scale.detach().exp()

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of unit image features (batch, features)."""
        return self.logits(features, self.text_features())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes) of images (batch, 3, height, width)."""
        return self.classify(self.image_features(images))

    # What is learnt

    def adapt(self, method: Method) -> None:
        """Attach the method to the CLIP, as the adapter of this learner.

        Raises:
            UnsupportedError: a tower lacks what the method needs.
            ConfigurationError: the CLIP has an adapter of that name.
        """
        try:
            attach(self.clip, method, self.adapter_name, head=False)
        except UnsupportedError as error:  # which names a method that a user of the learner need not know
            raise UnsupportedError(f"{type(self).__name__} does not work on this CLIP: {error}") from None
        self.acting = acting_adapters(self.clip)
        self.adapted = True
        self.train()

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What is learnt, by name: of the CLIP all that the learner's own adapter has, whether it acts now or not.

        Raises:
            ConfigurationError: the adapter was taken off the CLIP, or merged.
        """
        if self.adapted:
            known(attached(self.clip), self.adapter_name)
        adapter = f"clip.peft.{self.adapter_name}." if self.adapted else None
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if (parameter.requires_grad if not name.startswith("clip.") else adapter and name.startswith(adapter))
        }

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The tensors that are saved, by name."""
        return self.own_parameters()

    @torch.no_grad()
    def load_trained_state(self, tensors: Mapping[str, torch.Tensor], what: str) -> None:
        """Take over saved tensors.

        Args:
            tensors: what `trained_state` gave.
            what: where they come from, for an error.

        Raises:
            StorageError: they differ in name or shape; nothing is changed.
        """
        own = self.trained_state()
        check_tensors(tensors, own, what)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def train(self, mode: bool = True):
        """Training mode for what is trained; the CLIP stays in evaluation mode."""
        super().train(mode)
        self.clip.eval()
        if has_adapters(self.clip):
            self.clip.peft.train(mode)
        return self
