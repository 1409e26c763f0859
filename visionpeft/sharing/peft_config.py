"""What an `adapter_config.json` of HF peft says: read, checked, and refused where it asks for more than we compute."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from visionpeft.errors import StorageError

# These only record where the adapter came from, or act only beside an option that is refused.
WITHOUT_EFFECT = {
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "init_ia3_weights", "megatron_core", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Initialisations that leave the weights of the backbone as they are, and those that move a part of them into the
# adapter which follows from the weights alone.
WITHOUT_PART, WITH_PART = (True, False, "gaussian", "eva", "orthogonal", "mica"), ("pissa", "olora")
DRAWN_ANEW = "pissa_niter_"  # findings/peft_pissa_niter_differs_at_each_reload.sh
CONVERSION = "convert it in the process that trains it (save_pretrained with path_initial_model_for_weight_conversion)"
# Kinds of adapters, and what is said in other fields of theirs: sizes, which the tensors have, too, and what only
# counts beside an option that is refused.
KINDS = {
    "LORA": ("r", "lora_alpha", "init_lora_weights", "kasa_config", "eva_config"),
    "IA3": ("init_lora_weights", "kasa_config"),
    "HIRA": ("r", "init_weights"),
    "MISS": ("r", "init_weights", "mini_r"),
    "OFT": ("r", "init_weights", "oft_block_size", "eps", "num_cayley_neumann_terms", "use_cayley_neumann"),
    "BOFT": ("init_weights", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
}
IMPORTED = "LoRA, DoRA, IA3, HiRA, MiSS, OFT and BOFT"
# Kinds of adapters that no change of weights or features can be equal to, and why:
# findings/peft_lily_depends_on_the_batch.sh
WITHOUT_EQUAL = {
    "LILY": "it weighs its matrices by a mean over the batch, so that logits depend on the other images in it",
}


@dataclass(frozen=True)
class PeftConfig:
    """The fields that decide what an adapter computes.

    Args:
        peft_type: one of `KINDS`.
        auto_mapping: class and module of the backbone.
        target_modules: full names or ends of names of the adapted modules, or a regular expression.
        exclude_modules: likewise, of modules that are left out.
        modules_to_save: names of modules that are trained whole.
        feedforward_modules: for IA3, modules whose input is scaled instead of their output.
        r: rank where no pattern matches.
        lora_alpha: numerator of the scale where no pattern matches.
        lora_dropout: dropout on the input of A.
        rank_pattern: ranks by regular expression of the name.
        alpha_pattern: numerators likewise.
        use_rslora: scale alpha / sqrt(rank) instead of alpha / rank.
        use_dora: weight-decomposed form, with a magnitude for each row.
        layers_to_transform: indices of the blocks that names in a list of `target_modules` are limited to.
        layers_pattern: name of the list of blocks those indices count in.
        init_lora_weights: how A and B began; "pissa" and "olora" took a part of the weight for it.
        kasa: the smallest singular values of the weights were dropped, and A is multiplied by a diagonal.
        bias: which biases are trained beside the changes: "none", "all" of the model's, or those of the adapted modules
            only ("lora_only" and likewise).
    """

    peft_type: str
    target_modules: str | list[str]
    auto_mapping: dict[str, str] = field(default_factory=dict)
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    feedforward_modules: str | list[str] | None = None
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    init_lora_weights: bool | str = True
    kasa: bool = False
    bias: str = "none"

    def rank(self, path: str) -> int:
        """Rank of the module of this name."""
        return _by_pattern(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """Numerator of the scale alpha / rank for the module of this name."""
        alpha = float(_by_pattern(self.alpha_pattern, path, self.lora_alpha))
        return alpha * math.sqrt(self.rank(path)) if self.use_rslora else alpha

    def require_one_alpha(self, path: str, what: str) -> None:
        """Refuse numerators of which several are meant for the module of this name.

        peft takes the first pattern that matches, but sorts them in the file, and so takes another one when it reads it
        than in the training. Of ranks the tensors say which it was.

        Raises:
            StorageError: naming the patterns.
        """
        meant = {pattern: value for pattern, value in self.alpha_pattern.items() if _is_pattern_of(pattern, path)}
        if len(set(meant.values())) > 1:
            raise StorageError(
                f"{what}: {' and '.join(map(repr, meant))} of alpha_pattern match {path}, and peft sorts them when "
                "it writes the file, so that it does not say with which of their values the adapter was trained; leave "
                "the one in adapter_config.json that stood first in the training"
            )

    def targets(self, path: str) -> bool:
        """Whether peft wraps the module of this name."""
        if _matches(self.exclude_modules, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save or ()):
            return False
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return _matches(self.target_modules, path)
        return _matches(self.target_modules, path) and self._in_layers(path)

    def scales_input(self, path: str) -> bool:
        """Whether IA3 scales the input of the module of this name."""
        return _matches(self.feedforward_modules, path)

    def _in_layers(self, path: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        names = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names or ()] or [r".*?\.[^.]*\.(\d+)\."]
        found = next(filter(None, (re.match(pattern, path) for pattern in patterns)), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def expression(path: str) -> str:
    """A regular expression that matches this name alone."""
    return path.replace(".", r"\.")


def read_config(content: object, what: str) -> PeftConfig:
    """Check the content of an `adapter_config.json`.

    Raises:
        StorageError: naming the field that is missing, of the wrong type, or asks for what is not computed here.
    """
    if not isinstance(content, dict) or not isinstance(content.get("peft_type"), str):
        raise StorageError(f"{what} is not a configuration of peft: it lacks peft_type")
    kind = content["peft_type"]
    if kind not in KINDS:
        why = f", because {WITHOUT_EQUAL[kind]}" if kind in WITHOUT_EQUAL else ""
        raise StorageError(f"{what} is of peft_type {kind}, which is not imported{why}; {IMPORTED} are")
    _check_options(kind, content, what)
    values = {"peft_type": kind}
    for key, (describe, accepts) in FIELDS.items():
        value = content.get(key)
        if value is None or (key == "r" and kind == "OFT"):  # there r is a number of blocks, or zero
            continue
        if not accepts(value):
            raise StorageError(f"{what}: {key} is {value!r}, but must be {describe}")
        values[key] = value
    values |= _initialisation(content, what)
    known = {*FIELDS, *WITHOUT_EFFECT, *KINDS[kind]}
    for key, value in content.items():
        if key not in known and value not in (None, False, [], {}, "none"):
            raise StorageError(f"{what}: {key}={value!r} is not supported; only plain {IMPORTED} are imported")
    if "target_modules" not in values:
        raise StorageError(f"{what} lacks target_modules")
    config = PeftConfig(**values)
    _check_expressions(config, what)
    return config


def _check_options(kind: str, content: dict, what: str) -> None:
    """Refuse forms of the changes of weights that compute something else.

    Raises:
        StorageError: naming the field.
    """
    if kind == "OFT" and content.get("use_cayley_neumann", True) is not False:
        raise StorageError(
            f"{what}: with use_cayley_neumann peft cuts the inverse to some terms of a series, so that what it turns "
            "by is no rotation; only use_cayley_neumann=False is imported"
        )
    if kind == "MISS" and content.get("init_weights") in ("bat", "mini"):
        form = content["init_weights"]
        raise StorageError(f"{what}: init_weights={form!r} is another form of MiSS, which is not imported")


def _initialisation(content: dict, what: str) -> dict[str, bool | str]:
    """How the adapter began, as far as it decides what the file means."""
    began, kasa = content.get("init_lora_weights", True), content.get("kasa_config") is not None
    if isinstance(began, str) and began.startswith(DRAWN_ANEW):
        raise StorageError(
            f"{what}: with init_lora_weights={began!r} peft draws the part that it takes out of the weights anew at "
            f"each reload, so that no model computes what was trained; {CONVERSION}"
        )
    if began not in (*WITHOUT_PART, *WITH_PART):
        remedy = f"; {CONVERSION}" if began in ("corda", "lora_ga") else ""
        raise StorageError(
            f"{what}: init_lora_weights={began!r} changed the weights of the backbone in a way that the adapter's file "
            f"does not hold{remedy}"
        )
    if kasa and began in WITH_PART:
        raise StorageError(f"{what}: kasa_config with init_lora_weights={began!r} is not supported, only one of them")
    return {"init_lora_weights": began, "kasa": kasa}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bias(value: object) -> bool:
    return isinstance(value, str) and (value in ("none", "all") or value.endswith("_only"))


def _is_names(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_layers(value: object) -> bool:
    return all(isinstance(index, int) for index in (value if isinstance(value, list) else [value]))


def _pattern_of(accepts):
    return lambda value: isinstance(value, dict) and all(accepts(each) for each in value.values())


NAMES = ("a name, a list of names or a regular expression", _is_names)
FIELDS = {
    "auto_mapping": ("names", _pattern_of(_is_text)),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "feedforward_modules": NAMES,
    "modules_to_save": ("a list of names", lambda value: isinstance(value, list) and _is_names(value)),
    "r": ("a positive integer", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number in [0, 1)", lambda value: _is_number(value) and 0 <= value < 1),
    "rank_pattern": ("names with positive integers", _pattern_of(_is_rank)),
    "alpha_pattern": ("names with numbers", _pattern_of(_is_number)),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "use_dora": ("true or false", lambda value: isinstance(value, bool)),
    "layers_to_transform": ("an index or a list of indices", _is_layers),
    "layers_pattern": NAMES,
    "bias": ("none, all or those of the adapted layers only", _is_bias),
}


def _check_expressions(config: PeftConfig, what: str) -> None:
    """Refuse names that are no regular expressions where peft reads them as such."""
    names = [*config.rank_pattern, *config.alpha_pattern, *(config.modules_to_save or ())]
    names += [n for n in (config.target_modules, config.exclude_modules, config.feedforward_modules) if _is_text(n)]
    names += [config.layers_pattern] if _is_text(config.layers_pattern) else config.layers_pattern or []
    for name in names:
        try:
            re.compile(rf"(^|.*\.)({name})($|\..*)")
        except (re.error, RecursionError, OverflowError):
            raise StorageError(f"{what}: {name!r} is not a regular expression") from None


def _matches(names: str | Iterable[str] | None, path: str) -> bool:
    """Whether a module's name is meant by a regular expression, or by a list of names or ends of names."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _by_pattern(patterns: dict, path: str, default):
    return next((value for pattern, value in patterns.items() if _is_pattern_of(pattern, path)), default)


def _is_pattern_of(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
