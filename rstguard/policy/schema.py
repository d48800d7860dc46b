"""The policy language as JSON Schema, for editors that complete and check YAML.

The schema is made from the models.  It says less than they do, never more: what it refuses, they
refuse too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from rstguard.engine.ruleset import RULE_NAME
from rstguard.policy.model import Policy

FILE_NAME = "policy.schema.json"
"""Its name beside the sample policies, whose first line refers to it."""

_DURATION: dict[str, Any] = {
    "type": "string",
    "pattern": r"^[0-9. smhdwy]+$",
    "examples": ["90s", "10m", "7d"],
}
_RATE = {"type": "string", "pattern": r"^[0-9]+ ?/ ?[smhd]$", "examples": ["100/s", "10/m"]}
_BYTE_RATE = {"type": "string", "pattern": r"^[0-9.]+ ?([kMG]?B|[KMG]iB) ?/ ?s$"}
_ADDRESS = {"type": "string", "examples": ["10.0.0.0/8", "2001:db8::/48"]}
_BY_READER: Mapping[str, dict[str, Any]] = MappingProxyType(
    {
        "_name": {"type": "string", "pattern": f"^{RULE_NAME.pattern}$"},
        "_interface": {"type": "string", "pattern": r"^[A-Za-z0-9_.@-]{0,15}\*?$"},
        "_trusted": _ADDRESS,
        "_version": {"const": 1},
        "mark_bits": {"type": "integer", "minimum": 0xFF, "maximum": 0xFF000000},
        "network": _ADDRESS,
        "byte_rate": _BYTE_RATE,
        "count": {"type": "integer"},
        "duration": _DURATION,
        "duration_or_never": _DURATION | {"pattern": r"^([0-9. smhdwy]+|never)$"},
        "percent": {"type": "string", "pattern": "^[0-9]{1,3} ?%$", "examples": ["80%"]},
        "port": {"type": "integer"},
        "ports": {"type": ["integer", "string"], "examples": [443, "8000-8100"]},
        "rate": _RATE,
        "rate_per_second": _RATE,
        "size": {"type": "string", "pattern": r"^[0-9.]+ ?([kMG]?B|[KMG]iB)$"},
        "RuleBase": _DURATION | {"type": ["string", "null"]},
    }
)
"""By the reader of a quantity: what it accepts."""


class _Generator(GenerateJsonSchema):
    """Knows what the readers of `rstguard.policy.quantities` accept."""

    def function_plain_schema(
        self, schema: core_schema.PlainValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """Return the schema of a value that one of our readers reads."""
        reader = schema["function"]["function"]
        return dict(_BY_READER[reader.__qualname__.partition(".")[0]])

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        """Return the schema of a SYN budget, which two words stand for as well."""
        budget = self.generate_inner(schema["schema"])
        return {"anyOf": [{"enum": ["auto", "off"]}, *budget["anyOf"][:1]]}

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        """Leave out defaults: they are in the engine's units, not in those of the file."""
        return self.generate_inner(schema["schema"])


def policy_schema() -> dict[str, Any]:
    """Return the JSON Schema of policy files."""
    made = Policy.model_json_schema(by_alias=True, schema_generator=_Generator)
    return {"$schema": _Generator.schema_dialect, **made, "title": "rstguard policy"}
