# SPDX-License-Identifier: Apache-2.0
"""nginx in front of several servers: each request goes to the one with the fewest, and answers are streamed through."""

from collections.abc import Sequence
from pathlib import Path

TEMPLATE = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  upstream engines {{
    least_conn;
{servers}
    keepalive 64;
  }}
  server {{
    listen {listen};
    location / {{
      proxy_pass http://engines;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_buffering off;
      proxy_request_buffering off;
      proxy_read_timeout 3600s;
      proxy_next_upstream error timeout http_502 http_503 non_idempotent;
      proxy_next_upstream_tries {tries};
    }}
  }}
}}
"""


def nginx_config(folder: Path, host: str, port: int, ports: Sequence[int]) -> str:
    """The configuration: listens on host and port, and hands on to the ports of this machine.

    folder: where nginx may write
    """
    servers = "\n".join(f"    server 127.0.0.1:{each} max_fails=1 fail_timeout=2s;" for each in ports)
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return TEMPLATE.format(folder=folder, servers=servers, listen=listen, tries=len(ports) + 1)
