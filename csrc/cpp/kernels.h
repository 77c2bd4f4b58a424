// Which kernels this CPU runs, and how their work is divided among threads.
#pragma once

#include <cstdint>
#include <vector>

#include "denoise.h"

namespace nova::cpp {

// Those that this CPU has the instructions for, best first.
const std::vector<Kernel>& kernels();

// Tokens do not see each other, so threads share nothing but weights: each takes some tokens
// through all steps. `parallel` is the address of GOMP_parallel in the OpenMP library that torch
// runs on, whose threads are there already; 0: threads are made for the call.
void denoise(const Kernel& kernel, const DenoiseArguments& arguments, int threads,
             std::uintptr_t parallel);

}  // namespace nova::cpp
