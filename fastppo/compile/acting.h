// Acting of a multi-layer perceptron within a compiled program: fused/actor.h, with parameters packed once for all steps of a loop.
// Included by native.cpp, whose headers it uses.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../fused/actor.h"

namespace {

struct KnownActor {
  std::vector<int64_t> network;
  std::unique_ptr<fastppo::Actor> actor;
};

thread_local KnownActor known_actor;  // of this thread's last call: most threads have one network

// network: as fused/operators.py `network_shape` takes it.
fastppo::Actor& actor_of(const int64_t* network, int64_t length) {
  auto& [numbers, actor] = known_actor;
  if (!actor || !std::equal(numbers.begin(), numbers.end(), network, network + length)) {
    numbers.assign(network, network + length);
    const int64_t hidden = network[5], *sizes = network + 6;
    actor = std::make_unique<fastppo::Actor>(
        fastppo::NetworkShape{network[0], network[1], hidden, sizes, network[2], network[3], network[4], length - 6 - hidden, sizes + hidden});
  }
  return *actor;
}

}  // namespace

// packed: (size,), at least what the actor needs.
extern "C" AOTITorchError aoti_torch_cpu_mlp_pack(AtenTensorHandle params_of, const int64_t* network, int64_t length, int64_t size,
                                                AtenTensorHandle* result) {
  const int64_t stride = 1;
  if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, result)) {
    return AOTI_TORCH_FAILURE;
  }
  const float* params = data_of(params_of);
  float* packed = data_of(*result);
  const fastppo::Actor& actor = actor_of(network, length);
  if (!params || !packed || size < actor.packed_size()) return AOTI_TORCH_FAILURE;
  std::fill_n(packed, size, 0.0f);
  actor.pack(params, 1, packed);
  return AOTI_TORCH_SUCCESS;
}

// packed, obs (N, D), noise (N, A) -> action (N, columns), int64 or float32
extern "C" AOTITorchError aoti_torch_cpu_mlp_act_packed(AtenTensorHandle packed_of, AtenTensorHandle obs_of, AtenTensorHandle noise_of,
                                                      const int64_t* network, int64_t length, int64_t columns, int32_t discrete,
                                                      AtenTensorHandle* result) {
  fastppo::Actor& actor = actor_of(network, length);
  int64_t* sizes;
  if (aoti_torch_get_sizes(obs_of, &sizes)) return AOTI_TORCH_FAILURE;
  if (columns != actor.num_columns() || (discrete != 0) != actor.is_discrete()) return AOTI_TORCH_FAILURE;
  const int64_t shape[] = {sizes[0], columns}, strides[] = {columns, 1};
  const int32_t type = discrete ? aoti_torch_dtype_int64() : aoti_torch_dtype_float32();
  if (aoti_torch_empty_strided(2, shape, strides, type, aoti_torch_device_type_cpu(), 0, result)) return AOTI_TORCH_FAILURE;
  const float *packed = data_of(packed_of), *obs = data_of(obs_of), *noise = data_of(noise_of);
  void* action;
  if (!packed || !obs || !noise || aoti_torch_get_data_ptr(*result, &action)) return AOTI_TORCH_FAILURE;
  actor.act({obs, nullptr, nullptr, nullptr, noise, action, shape[0], 1}, packed, 1);
  return AOTI_TORCH_SUCCESS;
}
