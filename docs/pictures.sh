#!/usr/bin/env bash
# The README's pictures of a sweep's report and of its TensorBoard: docs/pictures.sh multirun/2026-01-31/12-00-00
set -eo pipefail
sweep=$(realpath "$1") docs=$(realpath "$(dirname "$0")") port=${2:-6061}

shoot() { # name, address, width, height
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=60000 \
        --window-size="$3,$4" --screenshot="$docs/$1.png" "$2"
    python - "$docs/$1.png" <<< "import sys; from PIL import Image
Image.open(sys.argv[1]).convert('RGB').quantize(128).save(sys.argv[1], optimize=True)"
}

shoot report "file://$sweep/report.html" 1360 1240
plots=$(mktemp --suffix .html) # the same page with nothing but its static plots
sed 's/^<\/style>/main > :not(.pictures, #pictures) { display: none; }&/; s/<details class="pictures"/& open/' \
    "$sweep/report.html" > "$plots"
shoot plots "file://$plots" 1360 1240
rm "$plots"
tensorboard --logdir "$sweep/tensorboard" --port "$port" --reload_interval 0 &
trap 'kill $!' EXIT
until curl -sf "localhost:$port/data/runs" | grep -q none; do sleep 1; done
shoot tensorboard "http://localhost:$port/?darkMode=false#hparams" 1500 760
