// Package reboot decides when a host may reboot, and makes it happen.
//
// # Gates
//
// A [Gate] answers one question: may we go on; if not, why, and when should we ask again? There are three answers. [Go] and
// [Wait] are plain; [Unknown] is that of a gate that could not be asked, and never counts as Go. [Ask] asks the gates of a host in
// order: those that only look first ([Window], [Inhibitors], [Files], [Commands], [Alerts]); then, only if nothing is against it
// yet, the people who are logged in ([Users]), because asking them tells them; and the cluster's [Semaphore] last of all, because what it
// gives out is shared. A [Panel] asks the same gates again and again: it bounds the time of each, and knows since when each is against it.
//
// # Order
//
//  1. The new system is on the disk and verified before the first gate is asked.
//  2. The semaphore has committed the grant, and the mark that the host reboots now, before the [Rebooter] is called.
//  3. A [Rebooter] that fails says so, and the slot is given back. One that succeeds ends this process.
//
// # logind
//
// [Logind] calls org.freedesktop.login1.Manager.Reboot and looks at the answer. Since systemd 257 an inhibitor of mode "block"
// refuses root too, with AccessDenied: that is a [BlockedError], which names who is in the way. The connection is often gone before the answer
// arrives, because the machine is going down: that is success.
package reboot
