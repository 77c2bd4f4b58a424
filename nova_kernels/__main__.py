"""`python -m nova_kernels` prints how the kernels were built and which GPUs they see."""

from nova_kernels.build_info import build_info, devices


def main() -> None:
    info = build_info()
    print(f"nova-kernels {info['version']}")
    if not info["cuda_extension"]:
        print(f"CUDA extension: {info['error']}")
        return
    print(
        f"CUDA extension: CUDA {info['cuda_version']} for {', '.join(info['architectures'])}"
        f" ({info['cuda_compiler']}, {info['host_compiler']})"
    )
    for index, device in enumerate(devices()):
        major, minor = device["compute_capability"]
        print(
            f"GPU {index}: {device['name']}, compute capability {major}.{minor},"
            f" {device['sm_count']} SMs, {device['memory_bytes'] / 2**30:.0f} GiB,"
            f" {device['shared_memory_per_block_optin'] // 1024} KiB shared memory a block"
        )


if __name__ == "__main__":
    main()
