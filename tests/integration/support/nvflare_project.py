"""The project from which NVFlare provisions a server and sites on this machine."""

from __future__ import annotations

from collections.abc import Sequence

_HEAD = """
api_version: 3
name: fedmezo
description: a server and its sites on one machine
builders:
- path: nvflare.lighter.impl.workspace.WorkspaceBuilder
  args: {template_file: [master_template.yml]}
- path: nvflare.lighter.impl.static_file.StaticFileBuilder
  args: {config_folder: config}
- path: nvflare.lighter.impl.cert.CertBuilder
- path: nvflare.lighter.impl.signature.SignatureBuilder
participants:
- {name: admin@nvidia.com, type: admin, org: test, role: project_admin}
"""


def project(port: int, sites: Sequence[str], connect_to: str = "") -> str:
    """A project file: the server listens on `port`, the sites connect to it or to host:port."""
    host, _, other = connect_to.rpartition(":")
    through = f", connect_to: {{host: {host}, port: {other}}}" if connect_to else ""
    server = f"type: server, org: test, default_host: localhost, fed_learn_port: {port}"
    lines = [f"- {{name: server, {server}}}"]
    lines += [f"- {{name: {site}, type: client, org: test{through}}}" for site in sites]
    return _HEAD + "\n".join(lines) + "\n"
