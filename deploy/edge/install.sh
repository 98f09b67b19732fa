#!/bin/sh
# Make this device a worker of a fleet, with one command:
#   sh install.sh fedmezo1:... --data /srv/rows.jsonl
# The join string may come from FEDMEZO_JOIN instead, where other users can see command lines. As root it
# installs a service of the system, otherwise one of your own. Run it again to change or upgrade
# something; --uninstall takes away what it made, except the data and, without --purge, the identity.
set -eu

say() { printf 'install.sh: %s\n' "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit "${2:-1}"; }
usage() {
  cat <<'TEXT'
Usage: install.sh [JOIN_STRING] --data PATH [options]
  --data PATH       rows: a JSONL, CSV or Parquet file, or a folder of them
  --set KEY=VALUE   another setting of the worker in TOML, such as threads=2 (several times)
  --package SPEC    what pip installs; default: fedmezo[worker,privacy]
  --torch SPEC      which torch; default by platform (docs/deployment.md)
  --torch-index URL package index that has it; default by platform
  --python PATH     Python 3.11 or newer; default: python3
  --prefix DIR      where programs go; default: /opt/fedmezo, or ~/.local/share/fedmezo
  --no-service      install and configure, and start nothing
  --uninstall       stop and remove the service and the programs
  --purge           with --uninstall: the configuration, identity and caches too
TEXT
}

JOIN=${FEDMEZO_JOIN:-} DATA='' SETTINGS='' PACKAGE='fedmezo[worker,privacy]' TORCH='torch>=2.6'
INDEX='' INDEX_GIVEN='' PYTHON=python3 PREFIX='' SERVICE=yes ACTION=install PURGE=''
while [ $# -gt 0 ]; do
  case $1 in
    --data|--set|--package|--torch|--torch-index|--python|--prefix)
      [ $# -ge 2 ] || fail "$1 needs a value; see --help." 2 ;;
  esac
  case $1 in
    --data) DATA=$2; shift ;;
    --set) SETTINGS="$SETTINGS$2
"; shift ;;
    --package) PACKAGE=$2; shift ;;
    --torch) TORCH=$2; shift ;;
    --torch-index) INDEX=$2 INDEX_GIVEN=yes; shift ;;
    --python) PYTHON=$2; shift ;;
    --prefix) PREFIX=$2; shift ;;
    --no-service) SERVICE='' ;;
    --uninstall) ACTION=uninstall ;;
    --purge) PURGE=yes ;;
    --help|-h) usage; exit 0 ;;
    -*) usage >&2; fail "there is no flag $1." 2 ;;
    *) JOIN=$1 ;;
  esac
  shift
done

if [ "$(id -u)" = 0 ]; then
  PREFIX=${PREFIX:-/opt/fedmezo} CONFIG=/etc/fedmezo STATE=/var/lib/fedmezo CACHE=/var/cache/fedmezo
  UNIT=/etc/systemd/system/fedmezo-worker.service SYSTEMCTL=systemctl
else
  PREFIX=${PREFIX:-${XDG_DATA_HOME:-$HOME/.local/share}/fedmezo}
  CONFIG=${XDG_CONFIG_HOME:-$HOME/.config}/fedmezo STATE=${XDG_STATE_HOME:-$HOME/.local/state}/fedmezo
  CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/fedmezo
  UNIT=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user/fedmezo-worker.service SYSTEMCTL='systemctl --user'
fi

if [ "$ACTION" = uninstall ]; then
  if [ -f "$UNIT" ]; then
    $SYSTEMCTL disable --now fedmezo-worker 2>/dev/null || true
    rm -f "$UNIT"
    $SYSTEMCTL daemon-reload 2>/dev/null || true
  fi
  # Only what has the marks of this script, so that a wrong --prefix takes nothing away.
  if [ -f "$PREFIX/.made-by-install.sh" ]; then rm -rf "$PREFIX"; fi
  if [ -n "$PURGE" ]; then
    rm -rf "$CONFIG/worker.toml" "$CONFIG/worker.env" "$STATE/worker" "$CACHE"
    rmdir "$CONFIG" "$STATE" 2>/dev/null || true
  fi
  say "the worker is gone from this device${PURGE:+, with its identity and settings}"
  exit 0
fi

# ---------------------------------------------------------------- what is given
[ -n "$JOIN" ] || [ -f "$CONFIG/worker.env" ] || { usage >&2; fail "give the operator's join string." 2; }
case $JOIN in
  ''|fedmezo1:*) ;;
  *) fail "a join string begins with fedmezo1: (ask the operator for: fedmezo token create)." 2 ;;
esac
[ -n "$DATA" ] || [ -f "$CONFIG/worker.toml" ] || { usage >&2; fail "--data is missing." 2; }
[ -z "$DATA" ] || [ -e "$DATA" ] || fail "there is no $DATA; check --data." 2
case $DATA in ''|/*) ;; *) DATA=$(pwd)/$DATA ;; esac
case $DATA in *[\"\\]*) fail "quotes and backslashes in --data are not supported; rename the file." 2 ;; esac
case $PREFIX in /*) ;; *) fail "--prefix $PREFIX is not an absolute path." 2 ;; esac
command -v "$PYTHON" > /dev/null || fail "there is no $PYTHON; install Python 3.11, or name one with --python."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "$PYTHON is older than Python 3.11; install a newer one, and name it with --python."
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$PYTHON has no venv; install it (Debian, Ubuntu: apt-get install python3-venv)."

# ---------------------------------------------------------------- which torch
if [ "$TORCH" != none ] && [ -z "$INDEX_GIVEN" ]; then
  if command -v nvidia-smi > /dev/null 2>&1 && nvidia-smi > /dev/null 2>&1; then
    PLATFORM="NVIDIA GPU on $(uname -m)"  # PyPI's wheels have CUDA, those for arm64 from 2.11 on.
    [ "$(uname -m)" != aarch64 ] || [ "$TORCH" != 'torch>=2.6' ] || TORCH='torch>=2.11'
  elif [ -f /etc/nv_tegra_release ] && grep -q '^# R3[56]' /etc/nv_tegra_release; then
    PLATFORM="Jetson with JetPack 5 or 6, on its CPU"
    say "this Jetson's GPU needs deploy/docker/worker-jetson.Dockerfile, or JetPack 7"
    INDEX=https://download.pytorch.org/whl/cpu
  else
    PLATFORM="CPU, $(uname -m)" INDEX=https://download.pytorch.org/whl/cpu
  fi
  say "$PLATFORM: $TORCH${INDEX:+ from $INDEX}"
fi

# ---------------------------------------------------------------- programs
mkdir -p "$PREFIX"
[ -x "$PREFIX/bin/python" ] || "$PYTHON" -m venv "$PREFIX"
: > "$PREFIX/.made-by-install.sh"
"$PREFIX/bin/python" -m pip install --quiet --upgrade pip
if [ "$TORCH" != none ]; then
  "$PREFIX/bin/python" -m pip install --quiet ${INDEX:+--index-url "$INDEX"} "$TORCH"
fi
"$PREFIX/bin/python" -m pip install --quiet --upgrade-strategy only-if-needed --upgrade "$PACKAGE"
VERSION=$("$PREFIX/bin/fedmezo-worker" --version)
say "$VERSION is in $PREFIX"

# ---------------------------------------------------------------- settings
# A file of each run goes into a folder; a device that has an earlier single copy keeps it.
COPIES="$STATE/worker/journal-copies"
[ ! -f "$STATE/worker/journal-copy.db" ] || COPIES="$STATE/worker/journal-copy.db"
(umask 077; mkdir -p "$CONFIG" "$STATE/worker" "$CACHE"; [ -f "$COPIES" ] || mkdir -p "$COPIES")
if [ -n "$DATA" ]; then
  {
    printf '# Written by install.sh.\ndata = "%s"\nstate = "%s"\njournal_copy = "%s"\n' \
      "$DATA" "$STATE/worker/identity" "$COPIES"
    printf '%s' "$SETTINGS"
  } > "$CONFIG/worker.toml.new"
  mv "$CONFIG/worker.toml.new" "$CONFIG/worker.toml"
fi
if [ -n "$JOIN" ]; then
  # A secret until it is used; later it names the identity that was made with it.
  (umask 077; printf 'FEDMEZO_WORKER_JOIN=%s\n' "$JOIN" > "$CONFIG/worker.env")
fi

# ---------------------------------------------------------------- service
if [ "$(id -u)" = 0 ]; then
  id fedmezo > /dev/null 2>&1 ||
    useradd --system --home-dir "$STATE" --shell /usr/sbin/nologin fedmezo
  chown -R fedmezo: "$STATE" "$CACHE"
  chmod 755 "$CONFIG"
  chmod 644 "$CONFIG/worker.toml"  # systemd itself reads worker.env, with the join string.
fi
mkdir -p "$(dirname "$UNIT")"
{
  cat <<UNIT_TEXT
[Unit]
Description=FedMeZO worker
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart=$PREFIX/bin/fedmezo-worker --config $CONFIG/worker.toml
ExecReload=/bin/kill -HUP \$MAINPID
EnvironmentFile=$CONFIG/worker.env
Environment=HF_HOME=$CACHE/huggingface NUMBA_CACHE_DIR=$CACHE/kernels
WorkingDirectory=$STATE/worker
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=30
WatchdogSec=60
TimeoutStopSec=10
Nice=10
UMask=0077
NoNewPrivileges=yes
UNIT_TEXT
  if [ "$(id -u)" = 0 ]; then
    cat <<UNIT_TEXT
User=fedmezo
Group=fedmezo
ReadWritePaths=$STATE $CACHE
ProtectSystem=strict
PrivateTmp=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
CapabilityBoundingSet=
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
UNIT_TEXT
  else
    printf '\n[Install]\nWantedBy=default.target\n'
  fi
} > "$UNIT"
if [ -z "$SERVICE" ]; then
  say "start it with: $SYSTEMCTL enable --now fedmezo-worker"
  exit 0
fi
$SYSTEMCTL daemon-reload
$SYSTEMCTL enable fedmezo-worker
$SYSTEMCTL restart fedmezo-worker
[ "$(id -u)" = 0 ] || loginctl enable-linger 2>/dev/null ||
  say "it ends when you log out; ask root for: loginctl enable-linger $(id -un)"
say "the worker runs; look at it with: $SYSTEMCTL status fedmezo-worker"
