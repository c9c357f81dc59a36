"""YAML as people write it: numbers, repeated keys, overrides and the cache folder."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from milora_vl.files import cache_folder


class ConfigError(ValueError):
    """A configuration that cannot be used; the text says where and what to write instead."""


class Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping; refuse repeated keys, of which YAML would keep the last."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise ConfigError(
                f"line {node.start_mark.line + 1}: key written twice: {sorted(twice)}"
            )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in nested plain values; the value is YAML.

    Raises:
        ConfigError: If the words cannot be read or a section is a value.
    """
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(f"override {override!r}: write section.key=value")
    *sections, key = name.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {section} is a value, not a section")
        values = inner
    try:
        values[key] = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {error}") from error


def expand_cache(value: Any) -> Any:
    """Return ``value`` with ``${MILORA_CACHE}`` replaced in all its texts."""
    if isinstance(value, str):
        return value.replace("${MILORA_CACHE}", str(cache_folder()))
    if isinstance(value, Mapping):
        return {key: expand_cache(inner) for key, inner in value.items()}
    return [expand_cache(inner) for inner in value] if isinstance(value, list) else value


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a hint: the known name nearest to ``name``, or ``otherwise`` when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else otherwise
