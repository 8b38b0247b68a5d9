"""What `slm-assist plan` prints."""

from collections.abc import Mapping
from typing import Any

GIB, DAY = 2**30, 86400


def table(plan: Mapping[str, Any]) -> str:
    """The result of `plan.plan` for people, a few lines of at most 120 characters."""
    devices, mesh = plan["devices"], plan["mesh"]
    where = f"{devices['count']} x {devices['kind']}" + (f" ({devices['shape']})" if devices["shape"] else "")
    parameters = ", ".join(f"{role} {_count(count)}" for role, count in plan["parameters"].items())
    lines = [
        f"devices     {where}, mesh {' x '.join(f'{name} {size}' for name, size in mesh.items())}",
        f"parameters  {parameters}",
        f"tokens      {_count(plan['tokens'])}, {plan['tokens_per_update']:,} an update",
        "",
        f"{'stage':<20}{'updates':>9}{'FLOPs a token':>15}{'an update':>11}{'seconds':>10}{'days':>10}{'added':>8}"
        f"{'memory':>11}",
    ]
    for name, stage in plan["stages"].items():
        memory, work = stage["memory"], sum(stage["flops"].values())
        days = stage["updates"] * stage["seconds"] / DAY
        lines.append(
            f"{name:<20}{stage['updates']:>9,}{work / plan['tokens_per_update']:>15.3g}{work:>11.3g}"
            f"{stage['seconds']:>10.3g}{days:>10.3g}{stage['added']:>+8.1%}{memory['total'] / GIB:>7.1f} GiB"
        )
    lines += ["", *(_memory(name, stage["memory"], plan["memory_limit"]) for name, stage in plan["stages"].items())]
    lines += [
        f"whole run: {plan['flops']:.4g} FLOPs, {plan['seconds'] / DAY:.3g} days; the small LM adds "
        f"{plan['added_time']:.1%} of the time and {plan['added_flops']:.1%} of the FLOPs",
        f"assumed: the devices reach {plan['utilisation']:.0%} of their peak (--utilisation), what compute.remat "
        "recomputes included;",
        "communication, input, validation, checkpoints, optimizer's matmuls, small LM's training are not counted",
    ]
    return "\n".join(lines)


def _count(number: int) -> str:
    """With a unit of M or B."""
    return f"{number / 1e9:,.4g}B" if number >= 1e9 else f"{number / 1e6:,.3g}M"


def _memory(name: str, memory: Mapping[str, Any], limit: float) -> str:
    """One stage's memory on a device, by part."""
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    margin = f" (an estimate counts {memory['margin']:g} times)" if memory["margin"] != 1 else ""
    parts = ", ".join(f"{part} {size / GIB:.1f}" for part, size in memory["parts"].items() if size >= 0.05 * GIB)
    said = f"; XLA: {memory['problem'][:150]}" if memory["problem"] else ""
    return (
        f"memory of {name} ({memory['how']}): {verdict} in {limit / GIB:.1f} GiB{margin}: {parts or 'below 0.05'}{said}"
    )
