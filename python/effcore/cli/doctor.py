"""``effcore doctor``: what is installed, what this machine has, and which path each op takes here."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

_PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "safetensors",
    "datasets",
    "peft",
    "gguf",
    "typer",
    "rich",
    "matplotlib",
)


def doctor(json_: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Versions, hardware, and which kernel each op uses on this machine and why. Exit code 1 where effcore cannot work."""
    findings = examine()
    if json_:
        print(json.dumps(findings))
    else:
        _show(findings)
    if findings["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """All findings; ``problems`` lists what keeps effcore from working, each with what to do."""
    import effcore

    findings: dict[str, Any] = {
        "effcore": effcore.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": _versions(),
        "problems": [],
    }
    findings["build"] = _build(findings["problems"])
    findings["cpu"] = _cpu()
    findings["cuda"] = _cuda(findings["problems"])
    findings["ops"] = _ops(findings) + _groups(findings)
    return findings


def _versions() -> dict[str, str | None]:
    from importlib import metadata

    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _build(problems: list[str]) -> dict[str, Any]:
    """What the native module says about itself."""
    try:
        from effcore import _core  # type: ignore[attr-defined]
    except ImportError as error:
        problems.append(
            f"the native module cannot be imported ({error}): reinstall with pip install --no-build-isolation ."
        )
        return {}
    information: dict[str, Any] = getattr(_core, "build_info", dict)()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in information.items()}


def _cpu() -> dict[str, Any]:
    """Name, threads, and the vector extensions that the kernels care about."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                elif key.strip() == "flags":
                    flags = set(value.split())
                    break
    except OSError:
        pass
    found: dict[str, Any] = {
        "name": name,
        "extensions": [
            flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if flag in flags
        ],
        "amx_permission": _amx_permission() if "amx_tile" in flags else None,
    }
    try:
        import torch

        found["threads"] = torch.get_num_threads()
    except ImportError:
        pass
    return found


def _amx_permission() -> bool | None:
    """Whether the kernel lets this process use AMX's tile registers (arch_prctl ARCH_GET_XCOMP_PERM, feature 18)."""
    import ctypes

    try:
        granted = ctypes.c_uint64(0)
        failed = ctypes.CDLL(None, use_errno=True).syscall(158, 0x1022, ctypes.byref(granted))
    except (OSError, AttributeError):
        return None
    return None if failed else bool(granted.value >> 18 & 1)


def _cuda(problems: list[str]) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        problems.append("torch is not installed; only effcore.array works without it")
        return {"available": False, "reason": "torch is not installed"}
    try:
        from effcore import _load

        _load.load_torch_ops()
    except (ImportError, OSError) as error:
        problems.append(f"the ops cannot be loaded into torch {torch.__version__}: {error}")
    if torch.version.cuda is None:
        return {"available": False, "reason": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {
            "available": False,
            "reason": "torch has CUDA, but there is no usable GPU or driver",
            "toolkit": torch.version.cuda,
        }
    found: dict[str, Any] = {"available": True, "toolkit": torch.version.cuda, "devices": []}
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        found["devices"].append(
            {
                "name": torch.cuda.get_device_name(index),
                "compute_capability": f"{capability[0]}.{capability[1]}",
                "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            }
        )
    return found


def _ops(findings: dict[str, Any]) -> list[dict[str, str]]:
    """Which path each family takes here, by device and dtype."""
    if not findings["build"]:
        return []
    isa = str(findings["build"].get("isa", "unknown"))
    vector = {"v2": "sse4.2", "v3": "avx2", "v4": "avx512", "bf16": "avx512", "amx": "avx512"}.get(isa, isa)
    rows = [
        _row("cpu", "float32, float64", vector, f"the widest vectors that this CPU and build have ({isa})", "all"),
        _row("cpu", "float16", vector, "converted to float32 while it is read", "all"),
    ]
    permission = findings["cpu"].get("amx_permission")
    no_amx = "the system does not permit AMX here" if permission is False else "this CPU or build has no AMX"
    if isa == "amx":
        rows.append(_row("cpu", "bfloat16", "amx tiles", "AMX is present and the system permits it", _WITH_PRODUCTS))
    elif isa == "bf16":
        rows.append(_row("cpu", "bfloat16", "avx512_bf16", f"dot products of pairs; {no_amx}", _WITH_PRODUCTS))
    if isa in ("amx", "bf16"):
        rows.append(_row("cpu", "bfloat16", vector, "no matrix products", _WITHOUT_PRODUCTS))
    else:
        rows.append(_row("cpu", "bfloat16", vector, f"converted to float32: {no_amx} and no AVX-512 BF16", "all"))
    cuda = findings["cuda"]
    if not cuda["available"]:
        rows.append(_row("cuda", "all", "none", cuda["reason"], "all"))
        return rows
    from effcore._load import library

    if library("effcore_torch_cuda") is None:
        rows.append(_row("cuda", "all", "none", "effcore was built without CUDA (EFFCORE_CUDA=ON builds it)", "all"))
        return rows
    rows += _cuda_rows(cuda["devices"])
    rows.append(_row("cuda", "float64", "none", "float64 runs on the CPU alone", "all"))
    return rows


_WITH_PRODUCTS, _WITHOUT_PRODUCTS = "attention, conv3d, kronecker, lowrank", "routing, scan"


# Whose 16-bit kernels differ on Hopper, and what these serve; all else takes the path of other GPUs.
_HOPPER = {
    "attention": "Hopper's tensor cores and copy engine, forward, and backward at head dimensions 64 and 128; "
    "rows that are no multiple of 16 bytes apart take mma sm_80",
    "conv3d": "channels in multiples of 8",
    "kronecker": "dimensions in multiples of 8",
    "lowrank": "shapes at which it measured faster than two products",
}
_CUDA_PATHS = {
    "mma sm_80": "tensor cores",
    "fma sm_80": "no tensor cores: float32 is not rounded to TF32",
    "cublas": "two products, then our activation",
    "sm_80": "no matrix products",
}


def _cuda_rows(devices: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What the library itself says of each family and dtype on each GPU."""
    import torch

    try:
        from effcore import _cuda
    except ImportError as error:
        return [_row("cuda", "all", "none", f"effcore._cuda cannot be imported: {error}", "all")]
    rows = []
    for index, device in enumerate(devices):
        with torch.cuda.device(index):
            for family in ("attention", "conv3d", "kronecker", "lowrank", "routing", "scan"):
                dtypes: dict[str, list[str]] = {}  # by answer
                for dtype in ("bfloat16", "float16", "float32"):
                    dtypes.setdefault(_cuda.path(family, dtype), []).append(dtype)
                for answer, names in dtypes.items():
                    path, _, why = answer.partition(": ")
                    why = why or (_HOPPER[family] if path == "wgmma sm_90a" else _CUDA_PATHS[path])
                    rows.append(_row("cuda", ", ".join(names), path, f"{device['name']}: {why}", family))
    return rows


def _groups(findings: dict[str, Any]) -> list[dict[str, str]]:
    """What ``keep="auto"`` does in QK groups of 4 and 16 layers, for a row of 4096 tokens and a width of 2048; and whose
    kernels serve a model's layer that shares nothing."""
    if not findings["build"]:
        return []
    from effcore.ops import _attention_plan as plan
    from effcore.ops._attention_autograd import probs_elements

    devices: list[tuple[str, int | None]] = [("cpu", None)]
    if findings["cuda"]["available"]:
        devices += [("cuda", index) for index in range(len(findings["cuda"]["devices"]))]
    rows = []
    for device, index in devices:
        kernels = plan.kernels_of(device, index)
        for head_dim in (64, 128):
            heads = 2048 // head_dim
            num_bytes = heads * probs_elements(4096, 4096, True) * 2
            for consumers in (3, 15):
                question = (kernels, head_dim, consumers, num_bytes, plan.default_budget(device, index))
                text = f"{heads} heads of {head_dim}, {consumers} consumers"
                rows.append(_row(device, text, f"keep {plan.choose(*question)}", plan.explain(*question), "QK group"))
            if plan.sdpa_is_faster(kernels, head_dim, 2048):
                longer = "" if plan.sdpa_is_faster(kernels, head_dim, 1 << 20) else "; ours for long sequences"
                rows.append(_row(device, f"head dimension {head_dim}", "SDPA", f"faster{longer}", "layer alone"))
    return rows


def _row(device: str, dtypes: str, path: str, reason: str, family: str = "attention") -> dict[str, str]:
    return {"family": family, "device": device, "dtypes": dtypes, "path": path, "reason": reason}


def _show(findings: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    build, cpu, cuda = findings["build"], findings["cpu"], findings["cuda"]
    console.print(f"[bold]effcore {findings['effcore']}[/] on Python {findings['python']}, {findings['system']}")
    console.print(
        "packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in findings["packages"].items())
    )
    console.print("build:    " + ", ".join(f"{name} {value}" for name, value in build.items() if name != "dtypes"))
    amx = {True: ", AMX permitted", False: ", AMX not permitted", None: ""}[cpu["amx_permission"]]
    extensions = " ".join(cpu["extensions"]) or "no vector extensions"
    console.print(f"cpu:      {cpu['name']}, {cpu.get('threads', '?')} threads, {extensions}{amx}")
    if cuda["available"]:
        for device in cuda["devices"]:
            capability, memory = device["compute_capability"], device["memory_gib"]
            console.print(f"cuda:     {device['name']}, sm {capability}, {memory} GiB, CUDA {cuda['toolkit']}")
    else:
        console.print(f"cuda:     none ({cuda['reason']})")
    table = Table("family", "device", "dtypes", "path", "why")
    for row in findings["ops"]:
        table.add_row(row["family"], row["device"], row["dtypes"], row["path"], row["reason"])
    console.print(table)
    for problem in findings["problems"]:
        console.print(f"[red]problem:[/] {problem}")
