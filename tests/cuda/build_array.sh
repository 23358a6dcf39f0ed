#!/bin/sh
# Builds effcore._core and effcore._cuda for the python3 of this machine, around a libeffcore_cuda.so that was compiled
# elsewhere (nvcc needs minutes, this some seconds), and runs the CuPy tests. From the repository's root:
#     tests/cuda/build_array.sh build/cuda-lib/lib [python3]
set -eu
libraries=$(cd "$1" && pwd)
python=${2:-python3}
build=${BUILD:-build/array}
cmake -S . -B "$build" -DEFFCORE_CUDA=OFF -DPython_EXECUTABLE="$(command -v "$python")" >/dev/null
cmake --build "$build" --target _core -j "$(nproc)" >/dev/null
include=$("$python" -c "import importlib.util as u, pathlib; print(pathlib.Path(u.find_spec('torch').origin).parent / 'include')")
package=$build/package/effcore
mkdir -p "$package"
# nvcc as a compiler of plain C++, because it knows where its headers and its runtime are
nvcc -O2 -std=c++20 -shared -cudart shared -Xcompiler -fPIC,-fvisibility=hidden -DEFFCORE_ARCHITECTURES='"carried"' \
    -I. -Icpp/include -Icuda/include $("$python" -m pybind11 --includes) -isystem "$include" \
    bindings/python/*_cuda.cpp "$build"/cpp/libeffcore_core.a -L"$libraries" -leffcore_cuda -Xlinker -rpath,"$libraries" \
    -o "$package/_cuda$("$python" -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")"
cp -r python/effcore/. "$package"
cp "$build"/bindings/_core*.so "$package"
PYTHONPATH="$build/package" "$python" -m pytest -p no:cacheprovider --noconftest -q tests/cuda/test_array_cupy.py tests/test_array.py
