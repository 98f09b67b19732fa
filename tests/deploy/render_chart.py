"""Renders the chart with Helm and checks it against Kubernetes; run with the tools' own Python.

Reads the values as JSON from standard input; writes the documents as JSON, or ends with 1.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

KUBERNETES = "1.31"


def main() -> None:
    """Render, validate, print."""
    helm, kubernetes = import_module("helm_python"), import_module("kubernetes_validate")
    load_all = import_module("yaml").safe_load_all
    folder, values = sys.argv[1], json.load(sys.stdin)
    found = helm.lint(folder)
    assert not found["errors"], found
    documents = []
    with helm.Chart.load(folder) as chart:
        try:
            chart.validate_schema(values)
            rendered = chart.render(values, name="demo", namespace="prod")
        except helm.HelmError as error:
            sys.exit(str(error))
    for name, text in rendered.items():
        if name.endswith(".yaml"):
            documents += [one for one in load_all(text) if one]
    for one in documents:
        if one["kind"] != "ServiceMonitor":  # It is the monitoring operator's, not Kubernetes's.
            kubernetes.validate(one, KUBERNETES, strict=True)
    print(json.dumps(documents))


if __name__ == "__main__":
    main()
