"""The reverse proxy that nodes reach: nginx, with a configuration that passes only the Fleet paths.

A request passes only if its path, exactly as sent, is one of ``fleet_api.PATHS``: no escape, dot
segment, doubled slash, parameter or query is interpreted anywhere. TLS 1.2 and 1.3 are supported, with
authenticated ciphers and ephemeral keys. A body has at most the size of one piece, and a time limit.

The limits allow for 200 nodes behind one address: a node has at most four requests in progress (two
pieces, a heartbeat and a query). A request beyond the limits gets a 503, and is retried.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Mapping
from pathlib import Path

from fedslm.deployment import fleet_api
from fedslm.deployment.authority import AUTHORITY, SERVER, SERVER_KEY
from fedslm.deployment.settings import FederationFile
from fedslm.errors import RunError
from fedslm.storage import write_text

REQUESTS_PER_ADDRESS, REQUESTS = 1024, 2048
_CONNECTIONS, _FILES = 8192, 16_384
_CONFIGURATION = """# Made by `fedslm server up`. Nodes reach the Fleet API's paths and nothing else.
daemon off;
pid {state}/proxy.pid;
error_log {logs}/proxy-errors.log warn;
worker_processes 1;
worker_rlimit_nofile {files};
events {{ worker_connections {connections}; }}
http {{
  map $status $unusual {{ ~^2 0; default 1; }}  # nodes ask every second: what went well is no news
  map $request_uri $is_plain {{ default 0; "~^({paths})$" 1; }}  # the line as it was sent
  access_log {logs}/proxy.log combined if=$unusual;
  client_body_temp_path {state}/proxy-body;
  proxy_temp_path {state}/proxy-temp;
  fastcgi_temp_path {state}/proxy-fastcgi;
  uwsgi_temp_path {state}/proxy-uwsgi;
  scgi_temp_path {state}/proxy-scgi;
  server_tokens off;
  limit_conn_zone $binary_remote_addr zone=address:10m;
  limit_conn_zone $server_port zone=all:1m;
  upstream superlink {{
    server 127.0.0.1:{inner_port};
    keepalive 64;
  }}
  server {{
    listen {port} ssl;
    ssl_certificate {directory}/{certificate};
    ssl_certificate_key {directory}/{key};
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_ciphers ECDHE+AESGCM:ECDHE+CHACHA20;
    ssl_prefer_server_ciphers on;
    ssl_session_cache shared:nodes:4m;
    ssl_session_tickets off;
    merge_slashes off;
    if ($is_plain = 0) {{ return 403; }}
    limit_conn address {per_address};
    limit_conn all {requests};
    client_max_body_size {body_bytes};
    client_header_buffer_size 2k;
    large_client_header_buffers 4 4k;
    client_header_timeout 10s;
    client_body_timeout 60s;
    send_timeout 60s;
    keepalive_timeout 75s;
    keepalive_requests 1000;
    reset_timedout_connection on;
    proxy_set_header Connection "";
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto https;
    proxy_ssl_trusted_certificate {directory}/{authority};
    proxy_ssl_verify on;
    proxy_ssl_name localhost;
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_buffering off;
    proxy_read_timeout 120s;
{locations}
    location / {{ return 403; }}
  }}
}}
"""
_LOCATION = (
    "    location = {path} {{ limit_except POST {{ deny all; }} proxy_pass https://superlink; }}"
)


def prepare(directory: Path, state: Path, logs: Path, federation: FederationFile) -> tuple[str, ...]:
    """Writes the proxy's configuration; returns its command.

    Args:
        directory: The server's directory.
        state: Directory of the configuration and temporary files.
        logs: Directory of its logs.
        federation: The operator's settings.

    Raises:
        RunError: nginx is not installed, or the configuration cannot be written.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        raise RunError("nginx is not installed; on Debian: apt-get install nginx-light")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    values: Mapping[str, object] = {
        "state": state,
        "logs": logs,
        "directory": directory,
        "certificate": SERVER,
        "key": SERVER_KEY,
        "authority": AUTHORITY,
        "port": federation.port,
        "inner_port": federation.inner_port,
        "files": files,
        "connections": min(_CONNECTIONS, files // 2),
        "per_address": REQUESTS_PER_ADDRESS,
        "requests": REQUESTS,
        "body_bytes": fleet_api.MOST_REQUEST_BYTES,
        "paths": "|".join(fleet_api.PATHS),
        "locations": "\n".join(_LOCATION.format(path=path) for path in fleet_api.PATHS),
    }
    write_text(state / "proxy.conf", _CONFIGURATION.format(**values))
    return (program, "-c", str(state / "proxy.conf"), "-p", str(state))
