"""All code that touches DeepSpeed's private parts.

Tested against the version in ``constraints.txt``; ``tests/distributed/_deepspeed/test_contract*``
has one test for each fact that this package relies on. DeepSpeed is imported when a function
needs it, never with this package. If it is already imported, a release that lacks a needed function
is refused at once (:func:`~moe_groups._deepspeed.contract.check_contract`). This package calls
the packages above it through ``ports.py``.

What ``contract.support_our_groups`` changes in DeepSpeed (groups that DeepSpeed made itself
train as before, bit for bit, unless clipping uses a norm that DeepSpeed computes wrongly):

* the ZeRO-1/2 and BF16 wrappers look up a group's ``name`` as a process-group key, so
  unique names become aliases of the key ``ep_size_<N>`` (the same handle, no new communicator),
  which the engine registers after it created the process groups;
* ``BF16_Optimizer`` and ``FP16_Optimizer`` run one all-reduce of the norm for each name that
  has a gradient on this rank. This hangs if the names differ between ranks; if they differ
  between ranks that share an expert, these clip by different norms. So names are merged to one
  per parallel group before the norm and the reduction, and all experts count. The sums equal
  those with DeepSpeed's own names, bit for bit;
* stages of a pipeline make the same process groups, and take part in each other's all-reduces
  of the norm (ZeRO-1 runs one for each group, BF16_Optimizer one for each parallel group).
  DeepSpeed alone hangs unless all stages have the same groups;
* a model whose experts are all frozen is stepped as a dense one, where DeepSpeed demands a group of
  experts; and a load restores each rank's frozen experts, where ZeRO-2 loads those of rank 0;
* under ZeRO-3 a layer whose experts are modules of their own becomes a leaf, whose experts are
  gathered together. DeepSpeed hangs if a rank has no token for one of them;
* ZeRO's norm counts the experts of all tensor-parallel ranks;
* gloo can gather tokens over tensor-parallel ranks;
* Muon steps the parameters of the groups with ``use_muon=True``; optimizers that cannot step
  our groups (the config's Muon, ``torch.optim.Muon`` under ZeRO) are refused;
* ``save_checkpoint`` writes the manifest of the groups, and ``load_checkpoint`` compares it
  (``checkpoints/guard/``);
* ``BF16_Optimizer`` collects garbage and prints the memory twice for each group during its
  setup, 0.3 s a group: with more than a few groups it does neither.

What ``collectives.support_kept_collectives`` changes, only in ``checkpoint_activations``: in a
recomputation the collectives of the MoE layers, AutoEP's too, return the results of the forward
pass. What ``balanced_gate`` changes, only in gates that were given a bias: they choose with it.
"""
