// The functions that operators.py calls: PPO's update and acting, for multi-layer perceptrons on the CPU.
//
// From the bottom: vector.h (one register), product.h (matrices), network.h (forward and backward), loss.h (the loss of rows),
// targets.h (a rollout's values and advantages), team.h (threads), actor.h (acting), update.h (epochs of minibatches).
// Knows nothing of Python or PyTorch.

#include "actor.h"
#include "update.h"

namespace fastppo {

// The actors of S seeds, with parameters packed once for many calls.
struct Actors {
  Actors(const NetworkShape& shape, int64_t seeds) : actor(shape), num_seeds(seeds), packed(seeds * actor.packed_size()) {}

  Actor actor;
  const int64_t num_seeds;
  Floats packed;
};

}  // namespace fastppo

extern "C" {

// The digest of the files that this library was built from: sources.py.
const char* fastppo_sources() { return FASTPPO_SOURCES; }

// Not 0: an exchange with other processes has failed.
int32_t fastppo_learn(const fastppo::LearnCall* call) { return fastppo::Update(*call).run(); }

fastppo::Actors* fastppo_new_actors(const fastppo::NetworkShape* shape, int64_t num_seeds) {
  return new fastppo::Actors(*shape, num_seeds);
}
void fastppo_delete_actors(fastppo::Actors* actors) { delete actors; }
void fastppo_set_actors(fastppo::Actors* actors, const float* params) {
  actors->actor.pack(params, actors->num_seeds, actors->packed.get());
}
void fastppo_act(fastppo::Actors* actors, const fastppo::ActCall* call) {
  actors->actor.act(*call, actors->packed.get(), actors->num_seeds);
}
}
