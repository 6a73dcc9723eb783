#!/usr/bin/env bash
# Run matcha_tts.py with these arguments in .venv-matcha, a virtual environment of its own, which is made first (once; minutes).
# It needs a C compiler: the package's alignment search is Cython, and must be built against the numpy that is installed.
set -euo pipefail
from=$PWD
cd "$(dirname "$0")/../.."

die() { echo "error: $*" >&2; exit 2; }

want=$({ cat requirements.txt "records/peers/matcha_tts.sh"; pwd -P; } | cksum)
if [ "$(cat .venv-matcha/installed 2>/dev/null)" != "$want" ]; then
  command -v "${CC:-cc}" > /dev/null || die "no C compiler (${CC:-cc}) found; on Debian: apt-get install gcc"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "expected Python 3.11 or later as python3"
  echo "installing requirements.txt and Matcha-TTS into .venv-matcha (once; minutes)" >&2
  python3 -m venv .venv-matcha
  pip() { .venv-matcha/bin/python -m pip install -q --disable-pip-version-check "$@"; }
  pip -r requirements.txt setuptools wheel "cython>=3,<4"
  # Of its dependencies only those that training and sampling import: it pins an old gradio, and its torchaudio may want another
  # torch. No build isolation: that would build against numpy 1.24
  pip "lightning>=2,<3" "diffusers<1" conformer==0.3.2 "hydra-core>=1.3,<2" "phonemizer>=3.3,<4" rich einops inflect Unidecode \
      gdown wget
  pip --no-build-isolation --no-deps matcha-tts==0.0.7.2
  echo "$want" > .venv-matcha/installed
fi
python=$PWD/.venv-matcha/bin/python script=$PWD/records/peers/matcha_tts.py
cd "$from"
exec "$python" -W ignore::FutureWarning -W ignore::UserWarning "$script" "$@"
