#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <thread>

namespace nova::cpp {
namespace {

std::vector<Kernel> find_kernels() {
  std::vector<Kernel> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) found.push_back(avx512_kernel());
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(avx2_kernel());
  }
#endif
  found.push_back(portable_kernel());
  return found;
}

struct Work {
  const Kernel& kernel;
  const DenoiseArguments& arguments;
  int parts;
  std::atomic<int> next{0};
};

// Takes parts of the work until none is left.
void work_on(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  const int tokens = work.arguments.tokens;
  for (int part = work.next++; part < work.parts; part = work.next++) {
    const int first = tokens * part / work.parts, last = tokens * (part + 1) / work.parts;
    std::vector<float> workspace(work.kernel.workspace(work.arguments, last - first));
    work.kernel.run(work.arguments, first, last, workspace.data());
  }
}

}  // namespace

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> found = find_kernels();
  return found;
}

void denoise(const Kernel& kernel, const DenoiseArguments& arguments, int threads,
             std::uintptr_t parallel) {
  Work work{kernel, arguments, std::max(1, std::min(threads, arguments.tokens))};
  if (parallel != 0) {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    reinterpret_cast<Parallel>(parallel)(&work_on, &work, work.parts, 0);
    return;
  }
  std::vector<std::thread> others;
  for (int part = 1; part < work.parts; ++part) others.emplace_back(&work_on, &work);
  work_on(&work);
  for (std::thread& other : others) other.join();
}

}  // namespace nova::cpp
