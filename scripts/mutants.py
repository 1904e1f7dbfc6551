"""Breaks loop, plan, objective and data one line at a time, and sees that the tests notice.

A mutant that survives is a promise that no test keeps. Takes some minutes.

    .venv/bin/python scripts/mutants.py            # all
    .venv/bin/python scripts/mutants.py clip       # those whose name has this word
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """One line of one file, written otherwise."""

    name: str
    file: str
    line: str
    broken: str


MUTANTS = [
    Mutant("weights by rows, not items", "objective/denominator.py", "counts[term] / items[term]", "1 / len(items)"),
    Mutant("no cancelling of Accelerate's division", "objective/denominator.py", "(self._passes * self._processes)", "1"),
    Mutant("cancels for one process", "objective/denominator.py", "(self._passes * self._processes)", "self._passes"),
    Mutant("items of this process alone", "objective/denominator.py", "if self._processes > 1:", "if False:"),
    Mutant("unweighted reported loss", "objective/denominator.py", ".detach()) * counts[term]", ".detach())"),
    Mutant("a sum taken for a mean", "objective/denominator.py", "/ (counts[term] or 1)", "/ 1"),
    Mutant("no shift", "objective/counting.py", "_targets(batch)[:, 1:] !=", "_targets(batch)[:, :] !="),
    Mutant("ignored labels counted", "objective/counting.py", "int((_targets(batch) != self.ignore_index).sum())", "_targets(batch).numel()"),
    Mutant("labels predict themselves", "objective/forward.py", 'batch["labels"]\n', 'batch["labels"].roll(1, 1)\n'),
    Mutant("padding never matters", "objective/probing.py", "if alike[term] <= tolerance < apart_[term]", "if False"),
    Mutant("even rows not told apart", "objective/counting.py", "targets[::2, 1:]", "targets[:, 1:]"),
    Mutant("rows of two labels ask nothing", "objective/counting.py", "[counted[counted > 0][not are_few :]]", "[counted[counted > 0][1:]]"),
    Mutant("held-out rows called training data", "assembly.py", "rows.subset(held, part)", "rows.subset(held)"),
    Mutant("integers beyond 64 bits", "rules.py", " and abs(value) <= _LARGEST", ""),
    Mutant("values that raise when asked", "rules.py", "        except Exception:  # users' objects", "        except KeyError:  # users' objects"),
    Mutant("what cannot be read raises", "rules.py", "    except Exception:  # a list", "    except KeyError:  # a list"),
    Mutant("long values shown whole", "rules.py", "is {shown(value)} instead", "is {value!r} instead"),
    Mutant("settings of verify not read", "verification/verifying.py", "read_as(VerifySettings, given)", "VerifySettings(**{name: given[name] for name in VerifySettings.__dataclass_fields__})"),
    Mutant("keys given twice", "mappings.py", "if key.value in names[:n]:", "if False:"),
    Mutant("YAML of 2005", "mappings.py", 'if tag.removeprefix(_TAG) not in _SCALARS]', "]"),
    Mutant("files that are no text", "mappings.py", "except (OSError, ValueError, RecursionError, yaml.YAMLError)", "except (OSError, yaml.YAMLError)"),
    Mutant("options of other commands unknown", "cli.py", "description=description, elsewhere=elsewhere", "description=description"),
    Mutant("words that are no numbers", "flags.py", "            if is_ruled:\n                return word\n", ""),
    Mutant("ties not asked again", "objective/probing.py", "if asking is not None and any(", "if False and any("),
    Mutant("last weights not shaken", "objective/steadying.py", "weight.add_(noise", "weight.sub_(0 * noise"),
    Mutant("measured in 16 bits", "objective/steadying.py", "converted(tensors, torch.float32)", "converted([])"),
    Mutant("train mode not looked at", "objective/measuring.py", "<= _UNCHANGED for term in chosen", "< 9e9 for term in chosen"),
    Mutant("dropout left on in the check", "rehearsing.py", "if function in _DROPOUTS:", "if False:"),
    Mutant("other draws taken for mixed rows", "rehearsing.py", "generators.unmoved() and np.allclose(run(), first, rtol=1e-6, equal_nan=True)", "True"),
    Mutant("norms left out where others draw", "rehearsing.py", "module.training = True", "module.training = False"),
    Mutant("parts of a loss left in it", "objective/forward.py", "return self.is_own and has_parts(outputs, LOSS)", "return False"),
    Mutant("parts of a loss at factor 1", "objective/forward.py", "name: factor * outputs[name]", "name: outputs[name]"),
    Mutant("rows and tokens alike", "objective/counting.py", "return int(mask.sum()) if", "return len(mask) if"),
    Mutant("a row by itself not looked at", "objective/findings.py", "< 1e-3 * abs(self.joint[term])", "< 0"),
    Mutant("padding of a loss_fn not told", "objective/findings.py", "if self.own_loss or not", "if True or not"),
    Mutant("inexact all the same", "arranging.py", 'if sentences and on_inexact == "error":', "if False:"),
    Mutant("one pass is enough to rehearse", "rehearsing.py", "and np.allclose(run(), first, rtol=1e-6, equal_nan=True)", ""),
    Mutant("learnt factors frozen", "objective/parts_of_loss.py", "math.nan if slope.requires_grad else slope.item()", "slope.item()"),
    Mutant("parts counted by rows", "objective/measuring.py", "dict.fromkeys(self.forward.parts, self.counting.applicable(", "dict.fromkeys(self.forward.parts, self.counting.of_inputs("),
    Mutant("one part under two names", "objective/parts_of_loss.py", "names = list({id(value): name", "names = list({name: name"),
    Mutant("norms that have no say not seen", "objective/measuring.py", "nudged(moving.values())", "nudged([])"),
    Mutant("drift not told", "objective/findings.py", "if self.in_training.drift > self.tolerance", "if False"),
    Mutant("told where nothing is accumulated", "arranging.py", "if accumulates(runtime, batching):", "if True:"),
    Mutant("rows that a loss mixes cut by length", "arranging.py", "if findings.mixes_rows or whole else runtime", "if whole else runtime"),
    Mutant("ghosts in train mode", "loop.py", "if self.objective.findings.in_training.complaint is not None:", "if False:"),
    Mutant("ghosts where nobody waits", "loop.py", "if micro.is_ghost and not (accelerator.sync_gradients", "if False and not (accelerator.sync_gradients"),
    Mutant("single rows found out in training", "arranging.py", "        if 1 in sizes:", "        if False:"),
    Mutant("a sum not told", "objective/probing.py", "adds_up = adds_up or all(", "adds_up = False and all("),
    Mutant("types of a column by its first row", "data/collating.py", "functools.reduce(torch.promote_types, dtypes)", "dtypes[0]"),
    Mutant("rows picked by length alone", "data/checking.py", "(kinds[p][0] in classes, kinds[p][1] in rests", "(False, kinds[p][1] in rests"),
    Mutant("rows picked whatever is left by four", "data/checking.py", "kinds[p][1] in rests", "False"),
    Mutant("class weights not counted", "objective/counting.py", 'names.insert(0, "class weights")', "pass"),
    Mutant("extremes of length not looked at", "data/checking.py", "    return [*shortest, max(everyone, key=lengths.__getitem__)]", "    return []"),
    Mutant("looked at in train mode", "side_effects.py", "in_mode(model, training=False)", "in_mode(model, training=True)"),
    Mutant("gradients never zeroed", "loop.py", "            p.grad = None", "            pass"),
    Mutant("gradients clipped scaled", "loop.py", "        self.accelerator.unscale_gradients()\n", ""),
    Mutant("sharded processes leave a window alone", "loop.py", "return [] if isinstance(", "return share[:-1] if isinstance("),
    Mutant("gradients of passes left beside their sum", "wide_gradients.py", "        p.grad = None\n        if found", "        if found"),
    Mutant("sums rounded to infinity", "wide_gradients.py", ".copy_(total.clamp_(-limit, limit))", ".copy_(total)"),
    Mutant("rows of an embedding taken for all", "wide_gradients.py", "rows = _zeros(total) if total.grad is None else total.grad", "rows = _zeros(total)"),
    Mutant("sums of one process", "wide_gradients.py", "        if agreement.alone:", "        if True:"),
    Mutant("sums over processes instead of means", "wide_gradients.py", "gradient /= distributed.get_world_size()", "pass"),
    Mutant("weights without a gradient get zeros", "wide_gradients.py", "if used and total.grad is None", "if total.grad is None"),
    Mutant("each process trains weights of its own", "wide_gradients.py", "if accelerator.num_processes > 1:", "if False:"),
    Mutant("sums need the last pass", "wide_gradients.py", "reduced_apart = True", "reduced_apart = False"),
    Mutant("hooks left on the weights", "wide_gradients.py", "                hook.remove()", "                pass"),
    Mutant("16-bit gradients left behind", "wide_gradients.py", "        for p in self.sums:\n            p.grad = None\n", ""),
    Mutant("clipped in every pass", "loop.py", "        passes.add(micro, means, contribution)", "        passes.add(micro, means, contribution)\n        accelerator.clip_grad_norm_(self._held, self.max_grad_norm)"),
    Mutant("clipped twice as low", "loop.py", "self._held, self.max_grad_norm)", "self._held, self.max_grad_norm / 2)"),
    Mutant("schedule steps when skipped", "loop.py", "            self.schedule.step()\n", "        self.schedule.step()\n"),
    Mutant("one term hides that another is no number", "objective/denominator.py", "for s, n in self._pairs() if n]", "for s, n in self._pairs() if n and s == s]"),
    Mutant("non-finite update taken", "loop.py", "or not math.isfinite(grad_norm)", ""),
    Mutant("infinite loss taken", "loop.py", "self.agreement.any(bool(suspects))", "False"),
    Mutant("each process skips by its own loss", "loop.py", "self.agreement.any(bool(suspects))", "bool(suspects)"),
    Mutant("a NaN stays in buffers", "loop.py", "            buffers.put_back()  # a NaN", "            pass  # a NaN"),
    Mutant("updates in a row counted over the run", "divergence.py", "            self.counts.in_a_row = 0\n", ""),
    Mutant("a run never ends for what is not finite", "divergence.py", "self.counts.in_a_row >= self.patience", "False"),
    Mutant("overflows are errors", "divergence.py", "if self.raises and not fault.is_overflow:", "if self.raises:"),
    Mutant("overflows told as faults", "divergence.py", "if fault.is_overflow and ended_by is None:", "if False:"),
    Mutant("every fault told", "divergence.py", "nth > _ALL_TOLD and", "False and"),
    Mutant("rows of this process alone named", "divergence.py", "_Looked.of_all(self.agreement.everyone(mine))", "_Looked.of_all([mine])"),
    Mutant("looking for rows draws", "divergence.py", "with only_looking(self.model):", "with torch.no_grad():"),
    Mutant("a row that cannot be run alone ends the run", "divergence.py", "except Exception:", "except ArithmeticError:"),
    Mutant("a ghost's loss laid at a row's door", "divergence.py", "for micro in fault.suspects if not micro.is_ghost]", "for micro in fault.suspects]"),
    Mutant("rows looked for without end", "divergence.py", "if len(found) == _NAMED:", "if False:"),
    Mutant("rows that lie one behind the other not taken apart", "data/loading.py", "if can_be_taken_apart(micro.batch, len(rows)):", "if True:"),
    Mutant("updates before an error not saved", "checkpointing/keeping.py", "            if is_whole():", "            if False:"),
    Mutant("an update half done saved", "checkpointing/keeping.py", "            if is_whole():", "            if True:"),
    Mutant("weights that may be why saved", "checkpointing/keeping.py", " or not self._is_sound():", ":"),
    Mutant("a signal stops one process alone", "checkpointing/keeping.py", "stop, by_hand, due = self._agreement.each([*self._asked(), self._is_due()])", "stop, by_hand, due = [*self._asked(), self._is_due()]"),
    Mutant("generators not put back", "checkpointing/state.py", "            Generators.of_state(processes[index][\"generators\"]).put_back()", "            pass"),
    Mutant("a checkpoint shares memory with the run", "checkpointing/keeping.py", "apart=fits)", "apart=False)"),
    Mutant("a damaged checkpoint taken", "checkpointing/manifest.py", "        if found != listed:", "        if False:"),
    Mutant("a run that diverged walked through", "checkpointing/resuming.py", "        if ended and not self.allowed:", "        if False:"),
    Mutant("a scheduler's second warning stops at once", "interrupts.py", "elif number == signal.SIGINT and", "elif"),
    Mutant("buffers that begin to move later forgotten", "loop.py", "if small or self", "if self"),
    Mutant("empty window taken", "loop.py", "or not n_items > 0", ""),
    Mutant("ghosts leave traces", "loop.py", "if micro.is_ghost:", "if False:"),
    Mutant("sync in the wrong pass", "loop.py", "len(share), 0", "1, 0"),
    Mutant("remainder dropped", "planning/windows.py", "and end < of_all:", "and end + size <= of_all:"),
    Mutant("remainders never carried", "planning/windows.py", 'room = of_all if self.remainder == "carry" else', "room ="),
    Mutant("k grows an update late", "planning/windows.py", "(min(following, at_most) - n)", "(min(following, at_most) - n + 1)"),
    Mutant("max_updates not kept", "planning/windows.py", "at_most = self.max_updates or n + of_all", "at_most = n + of_all"),
    Mutant("carried rows lost", "planning/windows.py", "before % self.n_rows, None)", "0, None)"),
    Mutant("a run begins at the first window of its epoch", "planning/windows.py", "indices[max(0, start - indices.start) :]", "indices[0:]"),
    Mutant("a stream begins at the first window of its epoch", "planning/streaming.py", "if window.index >= start)", ")"),
    Mutant("a row twice in a window drawn for once", "data/loading.py", "take(whole, piece.places)", "take(whole, [share.window.index(row) for row in piece.rows])"),
    Mutant("rates that are tensors recorded so", "loop.py", 'float(self.schedule.optimizer.param_groups[0]["lr"])', 'self.schedule.optimizer.param_groups[0]["lr"]'),
    Mutant("scaled rates left behind", "optim.py", '            group["lr"] = rate\n', "            pass\n"),
    Mutant("the rate follows taken updates", "loop.py", "factor = self.rate_factor(window.index)", "factor = self.rate_factor(self.schedule.last_epoch)"),
    Mutant("the rate recorded is not the one used", "loop.py", '["lr"]) * factor', '["lr"])'),
    Mutant("epochs without an update cost patience", "selection.py", "elif updated:", "else:"),
    Mutant("rows that were looked at are lost", "data/streaming.py", "missing = n - (self._came - self._taken)", "missing = n"),
    Mutant("rows of a stream are never let go", "data/streaming.py", "if position < needed_from]", "if position < 0]"),
    Mutant("rows are let go while in work", "planning/streaming.py", "self.read(epoch, n, self._starts[0])", "self.read(epoch, n, self._starts[1])"),
    Mutant("every process reads the stream", "memory.py", "        if self.alone:\n            return make()\n", "        return make()\n"),
    Mutant("a stream sees the other processes", "reading.py", "        distributed.group.WORLD = group\n", ""),
    Mutant("a stream sees the others' ranks", "reading.py", "_overlaid(os.environ, _ALONE)", "_overlaid(os.environ, {})"),
    Mutant("a stream's draws follow the cut", "data/streaming.py", "        self._generators.put_back()\n", ""),
    Mutant("a pass begins where the last one did", "data/streaming.py", "if epoch != self._epoch:", "if self._rows is None:"),
    Mutant("a pair made of what is no text", "data/text.py", "if not isinstance(value, str):", "if False and not isinstance(value, str):"),
    Mutant("rows that come later may be anything", "data/streaming.py", "            check_row(row, self.argument, self.name_of", "            position or check_row(row, self.argument, self.name_of"),
    Mutant("rows that are to come are not tokenised", "data/streaming.py", "        self._stream.steps.append(step)\n", ""),
    Mutant("a stream's remainder is dropped", "planning/streaming.py", "if self._n_open and (is_last or not self._begins(epoch + 1)):", "if self._n_open and is_last:"),
    Mutant("empty passes are trained on", "planning/streaming.py", "self._begun, self._ended = epoch, not self._more(epoch, 1)", "self._begun, self._ended = epoch, not (self._more(epoch, 1), True)"),
    Mutant("buckets wider than the model", "assembly.py", "return data.most_tokens(parts.tokenizer, parts.configuration, parts.model) or sys.maxsize", "return sys.maxsize"),
    Mutant("milestones at epochs' ends that no update has", "tuning/trials.py", 'if plan.remainder == "carry" else', "if False else"),
    Mutant("ghosts not counted in the cost", "cutting.py", "least[n_rows] + ghosts * costs.per_pass", "least[n_rows]"),
    Mutant("not the cheapest cut", "cutting.py", "better = reached < least[ends]", "better = np.isinf(least[ends])"),
    Mutant("caps on tokens not kept", "cutting.py", "        if self.caps.tokens is None:\n            return", "        if True:\n            return"),
    Mutant("rows of one length in another order", "cutting.py", 'np.argsort(-known, kind="stable")', "np.argsort(known)[::-1]"),
    Mutant("smallest micro-batches first", "cutting.py", "-max(piece.tokens for piece in slices)", "max(piece.tokens for piece in slices)"),
    Mutant("unequal loads", "cutting.py", "by_load = sorted(shares, key=lambda share: sum(piece.tokens for piece in share))", "by_load = shares"),
    Mutant("packed rows cost what padded ones do", "cutting.py", "        if self.packed:\n            return np.cumsum(lengths)\n", ""),
    Mutant("rows without tokens padded to none", "data/collating.py", "        length = max(1, length)", "        pass"),
    Mutant("rows without tokens packed as they are", "data/packing.py", "            return self._nothing\n", "            pass\n"),
    Mutant("rows packed without a seam", "data/packing.py", "separator_id=ignore_index", "return_position_ids=False"),
    Mutant("packing not tried before training", "assembly.py", "if not off <= EXPLAINED:", "if False:"),
    Mutant("faulty row of a packed batch named by its place", "data/checking.py", "if len(outside) == 1 < len(positions) and", "if False and"),
    Mutant("what was read ahead fails too early", "data/feeding.py", "        except Exception as error:  # the end of the epoch, too\n            self._read.append(error)", "        except StopIteration as error:\n            self._read.append(error)"),
    Mutant("windows read ahead keep their old caps", "data/feeding.py", "portion.cutter == self.feed.cutter", "True"),
    Mutant("shares read ahead keep their old costs", "data/feeding.py", "portion.cutter == self.feed.cutter", "portion.cutter.caps == self.feed.cutter.caps"),
    Mutant("a window of draws not trimmed", "data/loading.py", "part if self._objective.padding_sensitive else trimmed(part)", "part"),
    Mutant("buffers synced in a pass", "session.py", ", broadcast_buffers=False", ""),
    Mutant("auto tries ghosts", "data/loading.py", "        return self._micro_batch(batch, Slice(rows))\n\n    def _collated", "        return self._or_ghost(self._micro_batch(batch, Slice(rows)))\n\n    def _collated"),
    Mutant("evaluation gives up", "evaluation.py", "if not is_out_of_memory(error) or len(micro.slice.rows) < 2:", "if True:"),
    Mutant("rows of an embedding counted twice", "embedding_gradients.py", "                weight.grad = None\n", ""),
    Mutant("generators not rewound", "loop.py", "            generators.put_back()\n", ""),
    Mutant("buffers not rewound", "loop.py", "            buffers.put_back()\n", ""),
    Mutant("gradients of the failed try kept", "loop.py", "            self._zero_gradients()\n            give_back_memory()", "            give_back_memory()"),
    Mutant("no agreement on memory", "memory.py", "return self.each([flag])[0]", "return flag"),
    Mutant("never grows back", "memory.py", "if self.caps != self.wanted and", "if False and"),
    Mutant("patience does not grow", "memory.py", "2 if self._grew else 1", "1"),
    Mutant("processes find different batch sizes", "physical_batch.py", "agreed = agreement.least(most) or 0", "agreed = most"),
    Mutant("auto's tries find no gradients", "physical_batch.py", "                _pass(model,", "                model.zero_grad(set_to_none=True)\n                _pass(model,"),
    Mutant("auto moves generators", "physical_batch.py", "with preserved_rng(), preserved_buffers(model):", "with preserved_buffers(model):"),
    Mutant("a wait in every pass", "loop.py", "        passes.add(micro, means, contribution)", "        passes.add(micro, means, contribution)\n        float(next(iter(means.values())))"),
    Mutant("noise settles what a pass costs", "calibration.py", "undisturbed = seconds_N <= _STALL", "undisturbed = seconds_N <= 1e9"),
    Mutant("the same order in every epoch", "planning/drawing.py", "seed, _EPOCH, epoch", "seed, _EPOCH, 0"),
    Mutant("held-out rows trained on", "planning/drawing.py", "np.sort(order[n_held:])", "np.sort(order)"),
    Mutant("padding attended to", "data/collating.py", "self._padded(\"attention_mask\", ones)", "torch.ones_like(batch[\"input_ids\"])"),
    Mutant("labels padded with 0", "data/collating.py", "self._ignore_index if is_label(name) else 0", "0"),
    Mutant("draws depend on the cut", "data/loading.py", "collation.draws or objective.padding_sensitive", "False"),
    Mutant("schedule counted in micro-batches", "preparing.py", "run.warmup, plan.n_windows)", "run.warmup, plan.n_windows * 4)"),
    Mutant("best weights not kept apart", "selection.py", 't.detach().to("cpu", copy=True)', "t.detach()"),
    Mutant("metrics of one process", "evaluation.py", "everyone = gather_object(predicted)", "everyone = predicted"),
    Mutant("a milestone told an update late", "watching.py", "self._ahead[0] <= rows", "self._ahead[0] < rows"),
    Mutant("rows counted over epochs' ends", "planning/windows.py", "return int(self._ends[n_windows - 1]) if", "return n_windows * self.batching.effective_batch_size if"),
    Mutant("windows lost where a run is ended", "preparing.py", "        recorder.drain()  #", "        #"),
    Mutant("evaluating counts as training", "watching.py", "self._work.timed(-1)", "self._work.timed(0)"),
    Mutant("milestones by the first batch alone", "tuning/milestones.py", "math.lcm(*batch_sizes)", "batch_sizes[0]"),
    Mutant("steps that halving misses", "tuning/milestones.py", "number * (budget // n_reports)", "rows"),
    Mutant("trials from weights of their own", "tuning/trials.py", "        seed_all(seed)\n", ""),
    Mutant("models of bad data kept", "tuning/trials.py", "error=error.with_traceback(None)", "error=error"),
    Mutant("one is not always tried", "tuning/space.py", "sorted({1, *choices})", "sorted(choices)"),
    Mutant("the coupled rate not scaled", "tuning/space.py", "RATE: rate * scale", "RATE: rate"),
    Mutant("beta2 coupled the other way round", "optim.py", "beta2**self._ratio", "beta2 ** (1 / self._ratio)"),
    Mutant("draws begin anew with each start", "tuning/proposing.py", "(self._seed, place_of(self._study, trial))", "(self._seed, trial.number)"),
    Mutant("interrupted trials count", "tuning/endings.py", "        return REASON in trial.user_attrs or is_given_up(trial)", "        return True"),
    Mutant("interrupted trials are dropped", "tuning/endings.py", "    if REASON in trial.user_attrs or is_given_up(trial) or any(", "    if True or any("),
    Mutant("what kills workers runs for ever", "tuning/endings.py", ">= _RUNS_AT_MOST - 1", ">= 10**9"),
    Mutant("the dead are not found", "tuning/endings.py", "        if is_gone(trial", "        if False and is_gone(trial"),
    Mutant("other settings go on", "tuning/studies.py", "if name in begun and begun[name] != value", "if False"),
    Mutant("other data go on", "tuning/studies.py", "elif budget != rows:", "elif False:"),
    Mutant("one trial too many", "tuning/worker.py", ">= self._settings.n_trials\n", "> self._settings.n_trials\n"),
    Mutant("pruned at the end, too", "tuning/trials.py", 'order == "prune" and milestone < budget', 'order == "prune"'),
    Mutant("each process decides", "tuning/team.py", "        if not self.is_main:\n", "        if False:\n"),
    Mutant("bad data cost trials", "tuning/worker.py", "return error is not None", "return False"),
    Mutant("two workers take one trial", "tuning/storages.py", "return _one_writer_at_a_time(made) if url.startswith(\"sqlite\") else made", "return made"),
    Mutant("pruned from an eighth on", "tuning/proposing.py", "math.ceil(len(steps) / 4) - 1", "0"),
    Mutant("an interrupt is not kept", "interrupts.py", "            self.asked, self._since = number, time.monotonic()", "            raise KeyboardInterrupt"),
    Mutant("a late interrupt is not heard", "tuning/conducting.py", "        interrupts.check()\n", ""),
    Mutant("verified against half the window", "verification/bench.py", "for position in order or rows)", "for position in (order or rows)[: 1 + len(rows) // 2])"),
    Mutant("dropout in what is run again", "rehearsing.py", "            _also_in_what_is_run_again(self.model),\n", ""),
    Mutant("a wrong loss passes", "verification/comparing.py", "<= tolerance for error in errors)", "<= tolerance for error in errors[:1])"),
    Mutant("what is no number passes", "verification/comparing.py", "all(error is not None and", "all(error is None or"),
    Mutant("the floor does not see float32", "verification/comparing.py", "factor=1 / 3", "factor=1.0"),
    Mutant("fp16 gradients left scaled", "verification/gradients.py", "p.grad.div_(scale) if scale != 1 else p.grad", "p.grad"),
    Mutant("each process tells its own error", "verification/comparing.py", "gather_object([(found.gradient_error(wanted), found.loss_error(wanted))])", "[(found.gradient_error(wanted), found.loss_error(wanted))]"),
    Mutant("gradients of the user lost", "side_effects.py", "            p.grad = gradient\n", "            pass\n"),
    Mutant("weights stay converted", "side_effects.py", "            t.data = data\n", "            pass\n"),
    Mutant("Trainer in train mode throughout", "verification/peers.py", "    model.train = lambda mode=True: model  # noqa: ARG005\n", "    model.train = model.train\n"),
    Mutant("more rows tokenised than needed", "verification/verifying.py", "order[:needed]", "order"),
    Mutant("renamed before it is on the disk", "files.py", "        yield beside\n        flushed(beside)\n", "        yield beside\n"),
    Mutant("a folder replaced in two steps", "files.py", "if not (target.exists() and _exchanged(beside, target)):", "if True:"),
    Mutant("errors in writing leave a half", "files.py", "    finally:\n        _remove(beside)", "    finally:\n        pass"),
    Mutant("nothing put back where renaming fails", "files.py", "            replaced.rename(target)\n", "            pass\n"),
    Mutant("links replaced by folders", "files.py", "Path(os.path.realpath(path))", "Path(path)"),
    Mutant("half a line left for readers", "files.py", "                os.truncate(self.path, self._size)\n", "                pass\n"),
    Mutant("half a line gone on with", "files.py", "            file.truncate(self._size)\n", ""),
    Mutant("a removed ledger goes on in the middle", "files.py", "if file.tell() < self._size:", "if False:"),
    Mutant("a full disk ends the run", "history/ledger.py", "        except OSError as error:\n            if not self._has_warned", "        except ZeroDivisionError as error:\n            if not self._has_warned"),
    Mutant("a full disk told with every line", "history/ledger.py", "if not self._has_warned:", "if True:"),
    Mutant("old entries not written anew", "history/ledger.py", "= sorted(entries, key", "= sorted(entries[:0], key"),
    Mutant("the main process alone knows what is not written", "outputs.py", "    broadcast_object_list(faults)\n", ""),
    Mutant("a model that cannot be saved ends the run", "outputs.py", "except Exception as error:", "except OSError as error:"),
    Mutant("a run that wrote nothing has status 0", "cli.py", "return _NOT_WRITTEN if result.unwritten else 0", "return 0"),
    Mutant("warnings point at Accelerate", "errors.py", "            last = depth\n", "            last = depth if last == depth - 1 or depth == 1 else last\n"),
    Mutant("trackers in training's thread", "trackers.py", "            self._waiting.append((name, arguments, options))\n", "            self._handed_on(name, arguments, options)\n"),
    Mutant("a tracker that cannot start ends the run", "trackers.py", "            tracker = start()\n        except _ERRORS as error:", "            tracker = start()\n        except ZeroDivisionError as error:"),
    Mutant("a tracker's start not waited for", "trackers.py", 'self._in_work: str | None = "start"', "self._in_work: str | None = None"),
    Mutant("a tracker that cannot start goes on", "trackers.py", "                self._ended = True\n                self._faults[\"start\"]", "                self._faults[\"start\"]"),
    Mutant("a tracker that starts late has lost what was told", "trackers.py", '                    "on. What it is told waits until it has."\n                )\n', '                    "on. What it is told waits until it has."\n                )\n                self._waiting.clear()\n'),
    Mutant("a tracker dropped at the first error", "trackers.py", "_ERRORS_IN_A_ROW = 5", "_ERRORS_IN_A_ROW = 1"),
    Mutant("errors counted over all entries", "trackers.py", "errors = 0 if self._handed_on(tracker, *entry) else errors + 1", "errors += not self._handed_on(tracker, *entry)"),
    Mutant("what waits is lost at the end", "trackers.py", "            self._ended = True\n            self._change.notify()\n", "            self._ended = True\n            self._waiting.clear()\n            self._change.notify()\n"),
    Mutant("a tracker that wakes up late goes on", "trackers.py", "            if self._left_behind:\n                return\n", ""),
    Mutant("each error of a tracker told", "trackers.py", "self._faults.setdefault(name,", "self._told.discard(name), self._faults.setdefault(name,"),
    Mutant("a process that is gone laid at the door of the rows", "others.py", "        error = error.__cause__\n", "        return None\n"),
    Mutant("one process told of others", "others.py", "None if alone else _of_others(error)", "_of_others(error)"),
    Mutant("a process that is gone told twice", "others.py", "    except LostProcessError:\n        raise\n", ""),
    Mutant("others missed in training alone", "fine_tuning.py", "others_watched(accelerator.num_processes == 1,", "others_watched(True,"),
    Mutant("generators as the process has them", "preparing.py", "    run.resumption.put_back_generators(state, recipe.random_seed)\n", ""),
    Mutant("rows renamed by tokenising", "data/rows.py", "return self._at(position) if self._names is None else self._names[self._at(position)]", "return self._at(position)"),
    Mutant("rows draw by the cut", "data/rows.py", "            self.draw = True\n        with", "            return rows\n        with"),
    Mutant("rows draw the same in every window", "data/loading.py", "positions[0], rows_seed=seed)", "positions[0], rows_seed=())"),
    Mutant("what a collator draws seldom depends on who makes the batch", "data/loading.py", "seeded(self._rows, positions, *seed, positions[0], rows_seed=seed)", "__call__(self._rows, positions, seed)"),
    Mutant("a collator that draws for nothing not seen to", "data/collating.py", "self._moves_generators(rows, positions) or not", "not"),
    Mutant("a few rows drawn twice for the check", "data/checking.py", "return collation.seeded(rows, chosen, 0)", "return collation.seeded(rows, chosen, len(chosen))"),
    Mutant("others of the dead stay dead", "data/workers.py", "if worker.process.exitcode is not None:\n                worker.end()", "if worker is first:\n                worker.end()"),
    Mutant("the dead read as far ahead again", "data/workers.py", ", ahead=1)", ")"),
    Mutant("workers hear what ends a run", "data/workers.py", "signal.signal(number, signal.SIG_IGN)", "pass"),
    Mutant("workers outlive who could not start the rest", "data/workers.py", "            self.end()  # those", "            # those"),
    Mutant("a worker waits for jobs that cannot come", "data/workers.py", "with suppress(EOFError):", "with suppress():"),
    Mutant("all workers draw from one seed", "data/workers.py", "torch.initial_seed() + place[\"id\"]", "torch.initial_seed()"),
    Mutant("every row compared to the first", "data/collating.py", "for row in [*self._sound, *fetched[:_FEW]]", "for row in fetched[:1]"),
    Mutant("no sound row known", "data/collating.py", "self._sound = self._fetched(rows, positions[:1], (0,))", "pass"),
    Mutant("rows of a kind that is none let pass", "data/rows.py", "        check_row(row, self.argument, f\"row", "        name or check_row(row, self.argument, f\"row"),
    Mutant("rows that were not given believed to be none", "data/rows.py", "len(rows) == len(indices) and", "True and"),
    Mutant("a collator may lose rows", "data/collating.py", "self._has_a_row_each = len(positions) in", "self._has_a_row_each = False and len(positions) in"),
    Mutant("rows without a finite loss not named", "objective/measuring.py", "are_some = 0 < len(faulty)", "are_some = 9 < len(faulty)"),
    Mutant("workers die for ever", "data/loading.py", "if self._deaths == _DEATHS:", "if False:"),
    Mutant("deaths never forgotten", "data/loading.py", "            self._deaths = 0\n            yield sorted(", "            yield sorted("),
    Mutant("metrics that fail cost the epoch", "training.py", "DivergedError, MetricsError, Agreed", "DivergedError, Agreed"),
    Mutant("what led to the main process's error is lost", "memory.py", "raise own or error", "raise error"),
    Mutant("free space asked for where there is none", "outputs.py", "    except OSError:\n        return []\n", "    except ZeroDivisionError:\n        return []\n"),
    Mutant("a newer result not read", "history/result.py", "for name, value in read.items() if name in _RESULT_NAMES}", "for name, value in read.items()}"),
    Mutant("labels that are refused decide what a head is for", "side_effects.py", "            config.problem_type = before\n", "            pass\n"),
    Mutant("each process tells its own row", "memory.py", "DataError(f\"{told[0]} (", "DataError(f\"{fault} ("),
    Mutant("names lost of rows that cannot be read", "data/rows.py", "name = index if self._names is None else self._names[index]", "name = index"),
    Mutant("a folder by another name is another", "checkpointing/shelf.py", "os.path.samefile(path, other)", "path == other"),
    Mutant("aside into what is gone on from", "checkpointing/shelf.py", "if behind is None or not _same(behind.parent, folder)", "if True"),
    Mutant("every hidden folder is ours", "checkpointing/shelf.py", "if _UNFINISHED.fullmatch(path.name):", 'if path.name.startswith("."):'),
    Mutant("what may pass is damage", "checkpointing/shelf.py", "except OSError as error:  # which may pass\n", "except OSError as error:  # which may pass\n                damaged.append(path)\n"),
    Mutant("a manifest of nothing", "checkpointing/manifest.py", "sorted(_REQUIRED - wanted.keys())", "[]"),
    Mutant("any format", "checkpointing/resuming.py", 'checkpoint.facts.get("format") != FORMAT', "False"),
    Mutant("a folder of two runs", "checkpointing/holding.py", "if error.errno in (errno.EACCES, errno.EAGAIN):", "if False:"),
    Mutant("an epoch that was cut has ended", "checkpointing/resuming.py", "checkpoint.n_epochs <= epoch:", "True:"),
    Mutant("an epoch that was cut forgets its losses", "recording.py", 'ended["losses"] if ended is not None', "None if ended is not None"),
    Mutant("other rows called the same", "checkpointing/resuming.py", "if self._changed & _OTHER_ROWS", "if False"),
    Mutant("a stream in other updates", "checkpointing/resuming.py", '"effective_batch_size" in self._changed', "False"),
    Mutant("a ledger emptied before all is read", "preparing.py", "    ledger = Ledger()\n", '    ledger = Ledger(run.folder and run.folder / "ledger.jsonl")\n'),
]  # fmt: skip

# What runs first finds most; of some files, the mutants are found elsewhere.
FIRST = {"cutting.py": "cutting", "memory.py": "memory", "physical_batch.py": "memory", "calibration.py": "planner"}
FIRST |= {"data/feeding.py": "planner", "data/packing.py": "planner", "assembly.py": "planner"}
FIRST |= {
    "watching.py": "watching",
    "running.py": "watching",
    "history/ledger.py": "outputs",
    "history/result.py": "outputs",
    "optim.py": "search",
}
FIRST |= {"files.py": "files", "trackers.py": "trackers", "outputs.py": "outputs", "errors.py": "trackers"}
FIRST |= {"others.py": "others", "fine_tuning.py": "storm", "preparing.py": "storm"}
FIRST["cli.py"] = "command_line"
FIRST |= {"tuning/milestones.py": "milestones", "planning/windows.py": "windows"}
FIRST |= {"planning/drawing.py": "planning", "selection.py": "growing_windows"}
FIRST |= {f"objective/{room}.py": "self_check" for room in ("findings", "forward", "measuring")}
FIRST |= {"objective/parts_of_loss.py": "parts_of_loss", "arranging.py": "self_check"}
FIRST |= {"rehearsing.py": "self_check", "objective/counting.py": "self_check", "objective/steadying.py": "probing"}
FIRST |= dict.fromkeys(
    ("data/text.py", "data/streaming.py", "planning/streaming.py", "reading.py", "recording.py"), "streaming"
)
FIRST |= {"wide_gradients.py": "precision", "divergence.py": "nonfinite"}
FIRST |= {"wide_gradients.py": "precision", "rules.py": "fuzz_settings"}
FIRST |= dict.fromkeys(("mappings.py", "flags.py", "cli.py"), "fuzz_command_line")
_SEARCHING = [
    "trials",
    "space",
    "studies",
    "worker",
    "team",
    "endings",
    "proposing",
    "storages",
    "conducting",
]
_VERIFYING = ["bench", "comparing", "gradients", "peers", "splits", "verifying"]
FIRST |= {f"verification/{room}.py": "verify" for room in _VERIFYING}
FIRST |= {"data/rows.py": "data_faults", "data/workers.py": "data_faults", "data/loading.py": "data_faults"}
FIRST |= {"data/checking.py": "data_faults"}
FIRST |= {f"checkpointing/{room}.py": "checkpoints" for room in ("holding", "manifest", "shelf")}
FIRST |= dict.fromkeys((f"checkpointing/{room}.py" for room in ("resuming", "state", "keeping")), "resuming")
FIRST |= {"recording.py": "resuming"}
FIRST |= {f"tuning/{room}.py": "search" for room in _SEARCHING} | {"interrupts.py": "preemption"}
TESTS = [
    "parity",
    "exactness",
    "fuzz",
    "fuzz_settings",
    "fuzz_command_line",
    "precision",
    "nonfinite",
    "planning",
    "windows",
    "growing_windows",
    "streaming",
    "cutting",
    "planner",
    "memory",
    "invariance",
    "evaluation",
    "self_check",
    "parts_of_loss",
    "losses",
    "probing",
    "lifecycle",
    "data_forms",
    "files",
    "trackers",
    "outputs",
    "data_faults",
    "watching",
    "checkpoints",
    "resuming",
    "preemption",
    "milestones",
    "search",
    "verify",
    "others",
    "storm",
]


def survives(mutant: Mutant) -> bool:
    """Runs the tests on a copy of the package with that line broken."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(PROJECT / "src", Path(folder) / "src")
        file = Path(folder) / "src" / "ftaccum" / mutant.file
        text = file.read_text()
        assert mutant.line in text, f"{mutant.name}: {mutant.file} has no line {mutant.line!r} any more"
        file.write_text(text.replace(mutant.line, mutant.broken))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        first = FIRST.get(mutant.file, TESTS[0])
        command += [f"tests/test_{name}.py" for name in [first, *(name for name in TESTS if name != first)]]
        environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True).returncode == 0


def main() -> None:
    word = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if word in mutant.name]
    survivors = []
    for mutant in chosen:
        alive = survives(mutant)
        survivors += [mutant.name] if alive else []
        print(f"{'SURVIVES' if alive else 'caught':>8}  {mutant.name}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
