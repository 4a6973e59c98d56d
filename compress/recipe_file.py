"""Recipe files: find one, apply `key=value` overrides, check it against the schema of its kind, write it in full.

The key `recipe` says of which kind a file is (`KINDS`); a file that does not say is of the first kind. All faults of a recipe are told at
once; an unknown key is one that names the closest known key. Imports neither torch nor transformers.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from compress.errors import UsageError
from compress.recipe import LearnMaskRecipe, Section
from compress.recipe_quantize import QuantizeRecipe
from compress.recipe_routing import LearnRoutingRecipe

Recipe = LearnMaskRecipe | LearnRoutingRecipe | QuantizeRecipe
# What `recipe:` says -> the schema. Each kind is driven by the command of the same name.
KINDS: dict[str, type[Recipe]] = {"learn-mask": LearnMaskRecipe, "learn-routing": LearnRoutingRecipe, "quantize": QuantizeRecipe}
R = TypeVar("R", bound=Recipe)


def recipe_path(name: str) -> Path:
    """A recipe file, or a shipped recipe by its name (`quickstart`). Raises UsageError with the closest names."""
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in name:
        shipped = shipped_recipes().get(path.stem)
        hint = f"; there is a shipped recipe {path.stem!r}" if shipped else ""
        raise UsageError(f"no recipe file at {name}{hint}")
    shipped_all = shipped_recipes()
    if name in shipped_all:
        return shipped_all[name]
    raise UsageError(f"no recipe {name!r}{_closest(name, shipped_all)}; `compress recipes ls` lists them")


def shipped_recipes() -> dict[str, Path]:
    """The recipes installed with the tool, by name."""
    folder = Path(str(resources.files("compress_recipes")))
    return {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe of any kind, apply `key=value` overrides and check it. Raises UsageError that lists every fault at once."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is not a recipe: expected keys and values, found {type(raw).__name__}")
    for override in overrides or []:
        apply_override(raw, override)
    return check_recipe(raw, str(path))


def load_recipe_of(kind: type[R], path: Path, overrides: list[str] | None = None) -> R:
    """As `load_recipe`, for a command that takes one kind only. Raises UsageError for a recipe of another kind, too."""
    found = load_recipe(path, overrides)
    if not isinstance(found, kind):
        raise UsageError(f"{path} is a {found.recipe} recipe; run it with `compress {found.recipe}`")
    return found


def check_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Validate parsed YAML. `where` names it in errors."""
    kind = raw.get("recipe", next(iter(KINDS)))
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"{where} is not a valid recipe:\n  recipe: {kind!r} is no kind of recipe{_closest(str(kind), KINDS)}")
    try:
        return KINDS[kind].model_validate(raw)
    except ValidationError as error:
        lines = "\n".join(f"  {line}" for line in _explain(error, KINDS[kind]))
        raise UsageError(f"{where} is not a valid recipe:\n{lines}") from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set `learn.steps=100` in parsed YAML, in place. The value is read as YAML, then typed by the schema."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override; write key=value, for example learn.steps=100")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise UsageError(f"the value of {override!r} is not valid YAML: {error}") from error
    if key == "pattern":
        value = text  # or YAML 1.1 would make 2:4 a number
    parts = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UsageError(f"{override!r}: {'.'.join(parts[:depth])} is a list of {len(node)}; use its number, from 0")
            index: Any = int(part)
        elif isinstance(node, dict):
            index = part
            if not last:
                node.setdefault(part, {})
                if node[part] is None:
                    node[part] = {}
        else:
            raise UsageError(f"{override!r}: {'.'.join(parts[:depth])} is a value, it has no {part!r}")
        if last:
            node[index] = value
        else:
            node = node[index]


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of recipes of all kinds."""
    return TypeAdapter(Recipe).json_schema()


def dump_recipe(recipe: Recipe) -> str:
    """The recipe with every default filled in, as YAML that reads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _explain(error: ValidationError, schema: type[Recipe]) -> list[str]:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            *parents, key = fault["loc"]
            lines.append(f"{where}: unknown key{_closest(str(key), _keys_at(schema, tuple(parents)))}")
        elif fault["type"] == "missing":
            lines.append(f"{where}: missing, and it has no default")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            given = fault.get("input")
            shown = (
                f" (given: {given!r})"
                if isinstance(given, (str, int, float, bool, type(None))) and repr(given) not in message
                else ""
            )
            lines.append(f"{where or 'recipe'}: {message[:1].lower()}{message[1:]}{shown}")
    return lines


def _keys_at(schema: type[Recipe], path: tuple[int | str, ...]) -> list[str]:
    """The known keys of the section at `path`."""
    section: Any = schema
    for part in path:
        if isinstance(part, int) or not hasattr(section, "model_fields"):
            continue
        known = section.model_fields.get(part)
        if known is None:
            continue  # the name of an entry, as under evaluate.texts
        section = _section_of(known.annotation) or section
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found:
            return found
    return None


def _closest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(sorted(known))}"
