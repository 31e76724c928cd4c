"""The one place that touches DeepSpeed's private parts.

Tested against the version in ``constraints.txt``; ``test_contract*.py`` in
``tests/distributed/_deepspeed/`` hold one test for each fact relied on here. DeepSpeed is imported
when a function needs it, never when this package is imported; where it is there already, a release
that lacks what is relied on is refused at once
(:func:`~moe_groups._deepspeed.contract.check_contract`). What it needs of the rest of the package
it calls through ``ports.py``.

What ``contract.support_our_groups`` changes in DeepSpeed (groups that DeepSpeed made itself
train as before, bit for bit, but where its norm was wrong and clipping uses it):

* the ZeRO-1/2 and BF16 wrappers look up a group's ``name`` as a process-group key, so
  unique names get aliases of the key ``ep_size_<N>`` (the same handle, no communicator),
  registered by the engine after it created the process groups;
* ``BF16_Optimizer`` and ``FP16_Optimizer`` run one all-reduce of the norm for each name
  that has a gradient on this rank, which hangs when ranks disagree, and clip by different
  norms where ranks that share an expert disagree: names are merged to one per parallel
  group before the norm and the reduction see them, and all experts count. Sums are then
  those of DeepSpeed's own names, bit for bit;
* stages of a pipeline make the same process groups, and take part in each other's
  all-reduces of the norm (ZeRO-1 runs one for each group, BF16_Optimizer one for each
  parallel group), where DeepSpeed waits for ever unless all stages have the same ones;
* ZeRO's norm counts the experts of all tensor-parallel ranks;
* gloo gathers tokens over tensor-parallel ranks;
* parameters under Muon are those of the groups that say ``use_muon``, and what cannot step
  our groups (the config's Muon, ``torch.optim.Muon`` under ZeRO) is refused;
* ``save_checkpoint`` and ``load_checkpoint`` write and compare what the groups were
  (``checkpoints/guard/``);
* ``BF16_Optimizer`` collects garbage and prints the memory twice for each group while it
  is set up, 0.3 s a group: not for more groups than a handful.

What ``collectives.support_kept_collectives`` changes, for functions in ``checkpoint_activations``
alone: the MoE layers' collectives give the results of the forward pass in a recomputation.
"""
