#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <system_error>
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
  std::mutex failing;
  std::exception_ptr failure;
};

// Takes parts of the work until none is left.
void take_parts(Work& work) {
  const int tokens = work.arguments.tokens;
  for (int part = work.next++; part < work.parts; part = work.next++) {
    const int first = tokens * part / work.parts, last = tokens * (part + 1) / work.parts;
    std::vector<float> workspace(work.kernel.workspace(work.arguments, last - first));
    work.kernel.run(work.arguments, first, last, workspace.data());
  }
}

// What a thread runs. An exception that left it would end the process; `denoise` throws it instead.
void work_on(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  try {
    take_parts(work);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(work.failing);
    work.failure = std::current_exception();
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
  } else {
    std::vector<std::thread> others;
    try {
      for (int part = 1; part < work.parts; ++part) others.emplace_back(&work_on, &work);
    } catch (const std::system_error&) {
      // The system gives no more threads; those that there are take all parts.
    }
    work_on(&work);
    for (std::thread& other : others) other.join();
  }
  if (work.failure) std::rethrow_exception(work.failure);
}

}  // namespace nova::cpp
