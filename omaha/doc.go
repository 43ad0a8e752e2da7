// Package omaha asks an update server for a release, reports how the update went, and fetches the payload.
//
// The protocol is Omaha 3.0 in XML, as Flatcar's public server, Nebraska and this project's own release server speak
// it. The element types come from go-omaha; what this package adds is distrust. A host that updates itself must live
// with every answer that a broken or hostile server, proxy or hotel network can give: it keeps its state, says clearly
// what was wrong, and asks again later.
//
// # A check
//
//	h, err := omaha.NewHTTP(omaha.HTTPOptions{Logger: logger})
//	c := &omaha.Client{URL: "https://updates.example.org/v1/update/", AppID: "org.example.os", Version: "1.2.3",
//		Track: "stable", Board: "amd64-usr", MachineID: id, HTTP: h}
//	answer, err := c.Check(ctx, omaha.CheckRequest{})
//
// An answer is either an [Offer] or a [Reason]. Only an answer that passed every test makes an Offer, in this order:
// the HTTP status, the size, the document's shape (package strict), exactly one part about our application, the
// application's status, the update check's status, and then the release itself: SemVer 2 version above the running one,
// size, SHA-256, plain file names, addresses of a permitted kind. The application's status comes first because a server
// that holds a host back says so there, and "error-internal" in the update check: that is [Deferred] and no error.
//
// The protocol has no signature and no freshness. An Offer is therefore a claim; trust comes from the payload's own
// signature and from the rule that versions only go up.
//
// # Events
//
// Servers rebuild a host's state from events: [DownloadStarted], [DownloadFinished], [Installed], the reboot, and
// [Booted] once with the version before; [Failed] from any point. A server that holds on to an update which this host
// has given up answers [InProgress]; a check with Reset cures that.
//
// # A download
//
// [NewDownload] makes a source of an offer's payload: it has a size and can be opened at any offset, resumes after a
// broken connection with a range request that If-Range protects, changes the address when one fails, and gives up a
// connection that is slower than a minimum rate.
//
// # Beside the protocol
//
// Omaha has no way to ask which channels there are, or what a host would get on another one without being granted it.
// This project's own server answers both: [Client.Channels] and [Client.Plan]. Others do not ([ErrNoChannels]).
//
// A check tells the server why this host does not move (CheckRequest.Hold), in an attribute that other servers ignore.
//
// # What is not here
//
// When to ask, and which versions failed on this host, is for whoever drives a Client to know: package updater does.
// [Failures] remembers which payload addresses to leave alone for a while.
package omaha
