package journal

import "github.com/flipside-linux/flipside/updater"

// ids are the MESSAGE_IDs of what the daemon tells. They never change: programs look for them.
var ids = map[updater.Kind]string{
	updater.Started:       "2994053cc5ca5f4aa5e722cd052ecf8b",
	updater.Stopping:      "8adad9e9b27b531fad923fb20ad45f19",
	updater.Reloaded:      "926f400cf61751c79dfd9f13c32b2fc7",
	updater.CheckFailed:   "b6148f39c07858e7bb3b0107a9a2d9a9",
	updater.NotTaken:      "f28bd663fcbf5d1781934c029cc371d0",
	updater.UpdateStarted: "bcb975a0265e5aeebe1c351bc3b2f7ab",
	updater.UpdateResumed: "0062ab77863b515d9b1c7b2c1d1c5b04",
	updater.UpdateFailed:  "ecb3ebb492a750cbab654fd1b0718b22",
	updater.UpdateRefused: "c6fee7effca95c909128f2d8a8acf8c1",
	updater.Withdrawn:     "cadb5cf4b03d5c5894d2a59d53f2270e",
	updater.UpdateArmed:   "89049debe91c56579a1a73f1a14a6dcf",
	updater.RebootWaits:   "c1282f8be6d85d86b1e8e3ba495d5125",
	updater.RebootAsked:   "02110835eda65c01ad16e0b748f2384c",
	updater.RebootStuck:   "e98958730e43545bb66f7d9d9926bf0c",
	updater.Halted:        "74040e87e12a5561a8713171f9b8055d",
	updater.TrialBoot:     "2ed75dc0eb3058f6bf75db9a6dbf08ee",
	updater.Healthy:       "348889be75435664970db89504dc7b1d",
	updater.Unhealthy:     "ac0e8f86899650eab7850da472ac6d4d",
	updater.FellBack:      "a985156a2ad8560d921949ba6c9ec7a6",
	updater.SlotTrouble:   "18b4a029ffc9561184d93941232266c0",
	updater.Semaphore:     "7c2c6d3a76f0567c83e356cd409c1a84",
	updater.Unreported:    "6558caea41485d2990575585dd6e7acf",
	updater.Ordered:       "9828e271aef95daaafd31c08c8a85b88",
	updater.StateTrouble:  "1f57d306120954009abe303c77a50447",
}

// ID returns the MESSAGE_ID of a kind, "" if it has none.
func ID(k updater.Kind) string { return ids[k] }
