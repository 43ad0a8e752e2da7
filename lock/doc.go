// Package lock is the cluster's reboot semaphore: who may be down now, who is next, and when everybody stops.
//
// # The story
//
// Hosts are in groups. A group has a [Policy] (how many may be down at once, in how many zones, when, and how many failures
// of one version are too many) and a [State]: the policy, the holders, the failures and the halts. Beside it is a queue. All of
// it is kept in a [Store] that the cluster shares; what follows from what is decided here, by functions of the state and the time,
// without a network or a clock.
//
// A host calls [Semaphore.Request] and is granted a slot, or waits in the queue. Whoever gives a slot back hands it to the next
// in the queue in the same transaction, so that a slot is never idle while somebody waits, and nobody has to compete for it. The one
// that was served is woken by a watch.
//
// A holder has a life: granted, rebooting, booted, and then a [Verdict]. Only a verdict frees a slot. There is no lease that
// passes the slot on when a host stays away: that would turn a bad release into a rolling outage. A host that stays away longer
// than the policy's boot deadline is late; it keeps its slot, and it counts as a failure of the version.
//
// A failure counts against the version's failure budget. When that is spent the version is halted for the group: nobody is
// granted a reboot into it until somebody calls [Keeper.Resume].
//
// One thing frees a slot without a verdict: that it was never used. A host that went away while it waited is granted a slot all the same when
// its turn comes. It is not down, and cannot go down without a mark; so after the policy's grant deadline the slot goes to the next.
//
// # Tokens
//
// A grant carries the store's revision at which it was made. It only grows, so that an answer from an older grant can be told
// and is refused with [ErrFenced].
//
// # Signatures
//
// Whoever may write to the store can write anything into the state. A group whose policy an owner has signed ([Keeper.Sign]) does not depend on it: each host whose
// key the owner has accepted says by its own signature that it goes down, before it does, and that it is up again; nobody but it, and an owner, can
// say that for it. A [Keeper] that knows the owner's key counts the hosts that are down by these records, in the transaction in which it says that its
// own host goes down, and puts the state right where it says something else. A record that is missing, spoilt or not the last counts as a host that is down.
//
// That a record is the last one follows from what the store itself says of it, and no client can choose: the revision at which it was made and how often it
// was written ([Record]). Both are part of what is signed. So a copy of an older record proves nothing, whatever its token.
//
// What somebody with the store's credentials still can do is keep everybody from rebooting, or forget failures and halts.
//
// # Order of durability
//
//  1. A slot is granted when the store has committed it, not before; a reply that was lost is found again by Request.
//  2. Mark(Rebooting) is committed before the reboot is called. A host whose Mark fails must not reboot.
//  3. The verdict is kept by the host until Release has returned nil.
//
// # Time
//
// Times in the state come from the clocks of several hosts. They are only used for deadlines of many minutes, for windows, and
// to show; never to order anything: the store's revisions do that.
//
// A host that has just booted may have any time, and some never know it. So what is written by a clock that nothing has set is marked as such, and nobody compares it with
// another; and who has such a clock compares with it what nobody else has written. For both, a holder is late, and a grant is unused, when one keeper has itself seen it so for as long
// as the deadline is: clocks that are wrong go on at the right speed.
package lock
