// Operators and a memory pool that compiled programs use and PyTorch lacks: an all-reduce between threads and fast reuse of
// freed memory; LSTM and GRU over whole sequences are in recurrence.h.
// compile/native.py builds this file once per machine and gives the speedup of each part. Knows nothing of the programs.

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "recurrence.h"

#include "acting.h"

// --- all-reduce -----------------------------------------------------------------------------------------------------------
//
// worker: int64 (6,): its number, rank of its process, number of workers, address of the meeting place, calls so far, and address
// of the function that adds up over processes, 0 where there is one.
// meeting place: a line of 8 int64 for each worker: calls it has come to, address of its x, calls it has left; of the first one
// also calls whose sum over processes is there, and its address; and one more line whose first number is not 0 once a worker has
// failed. Nobody leaves before all have read. Who waits spins some 20 us, then yields.

namespace {

constexpr int64_t kLine = 8;
constexpr int kSpins = 10000;

using Exchange = int32_t(float* data, int64_t size);  // data becomes its sum over processes; not 0: it has failed

bool wait_for(const int64_t* place, int64_t number, int64_t workers, int64_t field, int64_t call) {
  for (int64_t spins = 0; __atomic_load_n(place + kLine * number + field, __ATOMIC_ACQUIRE) < call; ++spins) {
    if (__atomic_load_n(place + kLine * workers, __ATOMIC_RELAXED)) return false;
    if (spins > kSpins) std::this_thread::yield();
  }
  return true;
}

bool arrive_and_wait(int64_t* place, int64_t number, int64_t workers, int64_t field, int64_t call) {
  __atomic_store_n(place + kLine * number + field, call, __ATOMIC_RELEASE);
  for (int64_t other = 0; other < workers; ++other) {
    if (!wait_for(place, other, workers, field, call)) return false;
  }
  return true;
}

void add_up(const int64_t* place, int64_t workers, float* sum, int64_t size) {
  for (int64_t other = 0; other < workers; ++other) {  // in the order of their numbers: all get the same bits
    const auto* theirs = reinterpret_cast<const float*>(__atomic_load_n(place + kLine * other + 1, __ATOMIC_RELAXED));
    if (other == 0) {
      std::memcpy(sum, theirs, size * sizeof(float));
    } else {
      for (int64_t i = 0; i < size; ++i) sum[i] += theirs[i];
    }
  }
}

}  // namespace

extern "C" AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle x, AtenTensorHandle worker, int32_t over_ranks,
                                                  AtenTensorHandle* result) {
  void *mine, *self_data, *sum_data;
  int64_t size;
  if (aoti_torch_clone(x, result) || aoti_torch_get_numel(x, &size) || aoti_torch_get_data_ptr(x, &mine) ||
      aoti_torch_get_data_ptr(worker, &self_data) || aoti_torch_get_data_ptr(*result, &sum_data)) {
    return AOTI_TORCH_FAILURE;
  }
  auto* self = static_cast<int64_t*>(self_data);
  auto* sum = static_cast<float*>(sum_data);
  const int64_t number = self[0], workers = self[2], call = ++self[4];
  auto* place = reinterpret_cast<int64_t*>(self[3]);
  auto* exchange = over_ranks ? reinterpret_cast<Exchange*>(self[5]) : nullptr;
  __atomic_store_n(place + kLine * number + 1, reinterpret_cast<int64_t>(mine), __ATOMIC_RELAXED);
  if (!arrive_and_wait(place, number, workers, 0, call)) return AOTI_TORCH_FAILURE;
  if (exchange == nullptr) {
    add_up(place, workers, sum, size);
  } else if (number == 0) {  // one of them speaks with the other processes
    add_up(place, workers, sum, size);
    if (exchange(sum, size) != 0) return AOTI_TORCH_FAILURE;
    __atomic_store_n(place + 4, reinterpret_cast<int64_t>(sum), __ATOMIC_RELAXED);
    __atomic_store_n(place + 3, call, __ATOMIC_RELEASE);
  } else {
    if (!wait_for(place, 0, workers, 3, call)) return AOTI_TORCH_FAILURE;
    std::memcpy(sum, reinterpret_cast<const float*>(__atomic_load_n(place + 4, __ATOMIC_RELAXED)), size * sizeof(float));
  }
  return arrive_and_wait(place, number, workers, 2, call) ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

// --- memory ---------------------------------------------------------------------------------------------------------------
//
// A compiled program allocates each intermediate tensor anew, hundreds a millisecond. Blocks of 2^6 to 2^20 bytes that are freed
// are kept for the next request of that size, in a list of the thread's own: no lock, no search. Anything larger, and what a list
// has no room for, goes back to the system.

namespace {

constexpr std::size_t kHeader = 64;  // before each block, which stays aligned to 64 bytes: its list, or kLists
constexpr int kSmallest = 6, kLists = 15;

struct Block {
  Block* next;
};

struct Lists {
  Block* first[kLists] = {};
  int length[kLists] = {};
  ~Lists();
};

thread_local bool lists_are_gone = false;  // trivial, so it outlives `lists` when a thread ends
thread_local Lists lists;

Lists::~Lists() {
  lists_are_gone = true;
  for (auto* block : first) {
    while (block != nullptr) {
      auto* next = block->next;
      std::free(reinterpret_cast<char*>(block) - kHeader);
      block = next;
    }
  }
}

int list_of(std::size_t bytes) {
  if (bytes <= (std::size_t{1} << kSmallest)) return 0;
  return 64 - __builtin_clzll(bytes - 1) - kSmallest;
}

int room(int list) {  // 4 MiB, and at least 8 blocks
  const int blocks = (4 << 20) >> (list + kSmallest);
  return blocks < 8 ? 8 : blocks > 256 ? 256 : blocks;
}

void give_back(void* data) {
  if (data == nullptr) return;
  auto* start = static_cast<char*>(data) - kHeader;
  const int list = *reinterpret_cast<int*>(start);
  if (list >= kLists || lists_are_gone || lists.length[list] >= room(list)) {
    std::free(start);
    return;
  }
  auto* block = static_cast<Block*>(data);
  block->next = lists.first[list];
  lists.first[list] = block;
  ++lists.length[list];
}

struct PoolAllocator final : c10::Allocator {
  c10::DataPtr allocate(std::size_t bytes) override {
    const c10::Device device(c10::DeviceType::CPU);
    if (bytes == 0) return {nullptr, nullptr, &give_back, device};
    const int list = list_of(bytes);
    if (list < kLists && !lists_are_gone && lists.first[list] != nullptr) {
      auto* block = lists.first[list];
      lists.first[list] = block->next;
      --lists.length[list];
      return {block, block, &give_back, device};
    }
    void* start = nullptr;
    const std::size_t size = list < kLists ? std::size_t{1} << (list + kSmallest) : bytes;
    if (posix_memalign(&start, kHeader, kHeader + size) != 0) throw std::bad_alloc();
    *static_cast<int*>(start) = list < kLists ? list : kLists;
    void* data = static_cast<char*>(start) + kHeader;
    return {data, data, &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

extern "C" void fastppo_pool_memory() {
  static PoolAllocator pool;
  c10::SetCPUAllocator(&pool, 1);
}
