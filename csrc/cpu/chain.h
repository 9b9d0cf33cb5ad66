// Chains of Langevin steps along the gradient of a network on the CPU.
#pragma once

#include <vector>

#include "common/step.h"
#include "cpu/convnet.h"

namespace fastlangevin {
namespace cpu {

// Takes steps in place on the states batch.x, in the order of the vector. Each step's x describes
// these states. A step whose grad has data moves along the gradient at the states before it; its
// grad describes batch.grad, which holds min(batch.chains, threads * batch.chunk) chains. If
// batch.energies is not null, it receives the energies at the last gradient.
//
// A thread takes all steps with a chunk of chains before it begins the next chunk. The states,
// their gradient and the values of the network then stay in its cache, and threads meet only at the
// end. The result is that of convnet_score and langevin_step in turn, bit for bit. workspace is
// that of convnet_score.
void convnet_chain(const ConvNet& net, const ConvBatch& batch, const std::vector<Step>& steps,
                   void* workspace, int threads);

}  // namespace cpu
}  // namespace fastlangevin
