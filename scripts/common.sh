# Sourced by quickstart and test: a virtual environment with the tested set of packages, made from nothing.

# make_environment FOLDER REQUIREMENT... : make it, or bring it up to date.
make_environment() {
  local folder=$1
  shift
  local python=${PYTHON:-python3}
  command -v git >/dev/null || { echo "error: git is not installed, or not on PATH" >&2; exit 68; }
  command -v "$python" >/dev/null || { echo "error: there is no $python; set PYTHON" >&2; exit 73; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: Python 3.11 or newer is needed, $python is $("$python" -V 2>&1); set PYTHON" >&2
    exit 73
  }
  # A virtual environment that was interrupted while it was made has no pip: begin again.
  "$folder/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$CONSTRAINTS" "$@"
}
