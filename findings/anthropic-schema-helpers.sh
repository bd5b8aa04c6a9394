#!/usr/bin/env bash
# The schema helpers of both official Anthropic SDKs turn "definitions" into a sentence.
#
# Expected: transform_schema (Python) and transformJSONSchema (TypeScript, behind
#   jsonSchemaOutputFormat) make a JSON Schema fit for structured outputs. A "$ref" still finds
#   its target afterwards, and both SDKs send the same request for the same schema.
# Happens: "$defs" is kept, but "definitions", where draft-07 and its generators put the same
#   thing, is taken for an unknown keyword and written into the description as text. The
#   "$ref" to it stays and points at nothing. Both do it, without a warning.
#   The texts differ, so the model reads another prompt: TypeScript writes JSON, Python a Python
#   literal. Python tells the model the address in "$schema", too; TypeScript drops it.
# Versions: anthropic 2.14.0 (PyPI), @anthropic-ai/sdk 1.14.0 (npm), zod 3.25.76 and
#   zod-to-json-schema 3.25.2 as one generator of "definitions". Seen on 2026-11-28.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund \
  @anthropic-ai/sdk@1.14.0 zod@3.25.76 zod-to-json-schema@3.25.2
python3 -m venv python
python/bin/pip install --quiet --disable-pip-version-check anthropic==2.14.0
cat >generate.mjs <<'JS'
import { z } from "zod/v3"
import { zodToJsonSchema } from "zod-to-json-schema"
const Price = z.object({ cents: z.number().int() })
const schema = zodToJsonSchema(z.object({ net: Price }), { definitions: { Price } })
delete schema.$schema
const old = JSON.stringify(schema)
console.log(JSON.stringify({
  definitions: schema,
  defs: JSON.parse(old.replaceAll("definitions", "$defs")),
  dialect: { $schema: "http://json-schema.org/draft-07/schema#", type: "object" },
}))
JS
cat >transform.mjs <<'JS'
import { readFileSync } from "node:fs"
import { transformJSONSchema } from "@anthropic-ai/sdk/lib/transform-json-schema"
const cases = Object.entries(JSON.parse(readFileSync(0, "utf8")))
const results = cases.map(([name, schema]) => [name, transformJSONSchema(schema)])
console.log(JSON.stringify(Object.fromEntries(results)))
JS
cat >check.py <<'PY'
import json, subprocess, sys
from anthropic import transform_schema

def node(script, text=None):
    done = subprocess.run(["node", script], input=text, capture_output=True, text=True, check=True)
    return done.stdout

text = node("generate.mjs")
cases = json.loads(text)
python = {name: transform_schema(schema) for name, schema in cases.items()}
typescript = json.loads(node("transform.mjs", text))
for name, schema in cases.items():
    print(f"{name}: given  {json.dumps(schema)}")
    print(f"  Python     {json.dumps(python[name])}")
    print(f"  TypeScript {json.dumps(typescript[name])}")

def is_lost(schema):
    """Whether `#/definitions/Price` is asked for and only a description speaks of it."""
    return (schema["properties"]["net"] == {"$ref": "#/definitions/Price"}
            and "definitions" not in schema
            and schema["description"].startswith("{definitions: {"))

def is_kept(schema):
    return (schema["properties"]["net"] == {"$ref": "#/$defs/Price"}
            and schema["$defs"]["Price"]["properties"] == {"cents": {"type": "integer"}}
            and "description" not in schema)

as_before = (
    is_lost(python["definitions"]) and is_lost(typescript["definitions"])
    and is_kept(python["defs"]) and is_kept(typescript["defs"])
    and "'type': 'integer'" in python["definitions"]["description"]
    and '"type":"integer"' in typescript["definitions"]["description"]
    and "$schema" in python["dialect"]["description"]
    and "description" not in typescript["dialect"])
sys.exit(0 if as_before else 1)
PY
python/bin/python -c 'import anthropic; print("anthropic", anthropic.__version__)'
env -i PATH="$PATH" HOME="$work" python/bin/python check.py
