"""All spaces by their names."""

import dataclasses

import yaml

from visionpeft.errors import ConfigurationError, UserError, did_you_mean
from visionpeft.methods.parts.field_types import from_json
from visionpeft.searching.autopeft import AutoPeftSpace
from visionpeft.searching.noah import NoahSpace
from visionpeft.searching.s3pet import S3PetSpace
from visionpeft.searching.s4 import S4Space
from visionpeft.searching.space import Space

SPACES: dict[str, type[Space]] = {space.name: space for space in (NoahSpace, AutoPeftSpace, S4Space, S3PetSpace)}


def make_space(name: str, options: str | None) -> Space:
    """A space by its name.

    Args:
        name: of the space.
        options: YAML of what its fields are, where not as by default.

    Raises:
        ConfigurationError: there is no such space, or it has no such option or value.
    """
    if name not in SPACES:
        raise ConfigurationError(f"there is no space {name!r}{did_you_mean(name, SPACES)}")
    try:
        values = yaml.safe_load(options) if options else {}
    except yaml.YAMLError as error:
        raise ConfigurationError(f"--space_options is not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"--space_options must be a mapping such as {{sizes: [1, 5]}}, not {options}")
    fields = {field.name: field.type for field in dataclasses.fields(SPACES[name])}
    for key in values:
        if key not in fields:
            raise ConfigurationError(f"space {name} has no option {key!r}{did_you_mean(key, fields)}")
    try:
        return SPACES[name](**{key: from_json(value, fields[key]) for key, value in values.items()})
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"--space_options {options} does not fit space {name}: {error}") from None
