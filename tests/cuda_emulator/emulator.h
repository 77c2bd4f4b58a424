// Runs CUDA kernels on the CPU, to prove their indexing and their synchronisation without a GPU.
//
// Every CUDA thread is a fiber. A fiber runs until it has to wait for others (__syncthreads, a
// warp's shuffle or mma, a counter in global memory); the next one is drawn at random, and warps
// drawn at random fall far behind, so that results that depend on the order of threads show. Shared
// memory starts as NaN. What waits for ever is reported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr int kWarpSize = 32;
constexpr std::size_t kStackBytes = 128 * 1024;
constexpr int kRoundsBehind = 64;  // for which a warp is slow, on average

// Threads that wait for each other; complete when all that still run have come.
struct Barrier {
  int members = 0, waiting = 0;
  unsigned generation = 0;

  void complete_if_all_here() {
    if (waiting == members) waiting = 0, ++generation;
  }
};

struct Warp {
  Barrier barrier;
  // What lanes show each other in one instruction.
  uint32_t shown[kWarpSize][8];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<double> shared;  // aligned
  int index = 0;
  int slow_warp = -1;  // falls behind the others; none, where the block has no such warp
  struct Cluster* cluster = nullptr;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

// An asynchronous copy into shared memory.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  dim3 thread;
  std::function<bool()> ready;  // empty: it can run
  bool done = false;
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;  // committed, oldest first

  Warp& warp() { return block->warps[thread.x / kWarpSize]; }
  int lane() const { return static_cast<int>(thread.x) % kWarpSize; }
  bool is_slow() const { return static_cast<int>(thread.x) / kWarpSize == block->slow_warp; }
};

// One launch; `current` is the fiber that runs.
class Launch {
 public:
  static inline Launch* active = nullptr;
  Fiber* current = nullptr;
  dim3 block_dim, grid_dim;

  // blocks: of the grid; cluster_size of them, neighbours, form a cluster.
  Launch(int blocks, int threads, std::size_t shared_bytes, int cluster_size, unsigned seed,
         std::function<void()> kernel)
      : block_dim{static_cast<unsigned>(threads)},
        grid_dim{static_cast<unsigned>(blocks)},
        kernel_(std::move(kernel)),
        random_(seed),
        blocks_(blocks),
        clusters_(blocks / cluster_size),
        fibers_(static_cast<std::size_t>(blocks) * threads) {
    if (threads % kWarpSize != 0 || blocks % cluster_size != 0) {
      throw std::invalid_argument("a launch needs whole warps and whole clusters");
    }
    for (int b = 0; b < blocks; ++b) {
      Block& block = blocks_[b];
      block.index = b;
      block.barrier.members = threads;
      block.warps.resize(threads / kWarpSize);
      for (Warp& warp : block.warps) warp.barrier.members = kWarpSize;
      block.shared.resize(shared_bytes / sizeof(double) + 1);
      std::memset(block.shared.data(), 0xff, block.shared.size() * sizeof(double));
      block.cluster = &clusters_[b / cluster_size];
      block.cluster->blocks.push_back(&block);
      block.cluster->barrier.members += threads;
      for (int t = 0; t < threads; ++t) start(fibers_[b * threads + t], block, t);
    }
  }

  void run() {
    active = this;
    std::vector<Fiber*> waiting;
    for (Fiber& fiber : fibers_) waiting.push_back(&fiber);
    draw_slow_warps();
    while (!waiting.empty()) {
      std::shuffle(waiting.begin(), waiting.end(), random_);
      bool moved = false, behind = false;
      for (Fiber* fiber : waiting) {
        if (fiber->ready && !fiber->ready()) continue;
        if (fiber->is_slow()) {
          behind = true;
          continue;
        }
        fiber->ready = nullptr;
        current = fiber;
        swapcontext(&scheduler_, &fiber->context);
        moved = true;
      }
      std::erase_if(waiting, [](const Fiber* fiber) { return fiber->done; });
      if (!moved && !behind) throw std::runtime_error("threads wait for each other for ever");
      if (!moved || random_() % kRoundsBehind == 0) draw_slow_warps();
    }
    active = nullptr;
  }

  void wait_for(std::function<bool()> ready) {
    current->ready = std::move(ready);
    swapcontext(&current->context, &scheduler_);
  }

  void wait_at(Barrier& barrier) {
    const unsigned before = barrier.generation;
    ++barrier.waiting;
    barrier.complete_if_all_here();
    if (barrier.generation == before) {
      wait_for([&barrier, before] { return barrier.generation != before; });
    }
  }

 private:
  static void enter() {
    Launch& launch = *active;
    launch.kernel_();
    Fiber& fiber = *launch.current;
    fiber.done = true;
    for (Barrier* barrier : {&fiber.warp().barrier, &fiber.block->barrier,
                             &fiber.block->cluster->barrier}) {
      --barrier->members;
      if (barrier->members > 0) barrier->complete_if_all_here();
    }
    swapcontext(&fiber.context, &launch.scheduler_);
  }

  // In every block one warp, or none.
  void draw_slow_warps() {
    for (Block& block : blocks_) block.slow_warp = random_() % (block.warps.size() + 1);
  }

  void start(Fiber& fiber, Block& block, int thread) {
    fiber.block = &block;
    fiber.thread = {static_cast<unsigned>(thread), 0, 0};
    fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler_;
    makecontext(&fiber.context, &Launch::enter, 0);
  }

  std::function<void()> kernel_;
  std::mt19937 random_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
};

inline Fiber& fiber() { return *Launch::active->current; }

// What lane `from` shows, once all lanes of the warp show theirs.
template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  Warp& warp = fiber().warp();
  std::memcpy(&warp.shown[fiber().lane()][0], &value, sizeof(T));
  Launch::active->wait_at(warp.barrier);
  T result;
  std::memcpy(&result, &warp.shown[from][0], sizeof(T));
  Launch::active->wait_at(warp.barrier);
  return result;
}

}  // namespace emulator
