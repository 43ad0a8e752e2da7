package trust

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/google/go-tpm/tpm2"
)

// The two NV indices of the floor. The counter can only be incremented: no command lowers it, and one that is deleted and made
// again goes on above the highest value that any counter of the TPM ever had. The base says which number the counter began with; it
// is written once and locked for good (TPMA_NV_WRITEDEFINE). So the floor is
//
//	base.floor + (counter - base.counter) * step
//
// and to lower it one must delete an index, which takes the owner's password. A floor that was provisioned before any number was known has a base
// that is written and not locked; the first release with a number writes it anew and locks it, so that the counter has no half
// century of days to count up. Both can be read, and the counter incremented, with the
// empty password and during a dictionary-attack lockout (TPMA_NV_NO_DA): the daemon needs no secret, and somebody who
// types wrong passwords stops no update.
const (
	nvCounter = tpm2.TPMHandle(0x0181F510)
	nvBase    = tpm2.TPMHandle(0x0181F511)
	step      = 24 * 60 * 60 // seconds that one increment stands for
)

// budget bounds the increments of one call of Raise. Each is a write to the TPM's flash and takes up to a tenth of a second; releases that come
// every few weeks need a few tens.
const budget = 400

// ErrBehind means that the floor in the TPM rose, and has further to go: the next call goes on from there.
var ErrBehind = errors.New("the floor in the TPM has not caught up yet")

// MaxNumber is the highest number that a floor can have: the year 2100. A higher one is a mistake, such as milliseconds.
const MaxNumber = 4102444800

var counterAttributes = tpm2.TPMANV{NT: tpm2.TPMNTCounter, AuthRead: true, AuthWrite: true, OwnerRead: true, NoDA: true}
var baseAttributes = tpm2.TPMANV{NT: tpm2.TPMNTOrdinary, AuthRead: true, AuthWrite: true, OwnerRead: true, NoDA: true, WriteDefine: true, WriteAll: true}

// base is the content of the base index.
type base struct {
	counter uint64
	floor   int64 // 0 in a base that is not locked: the first release decides
}

const (
	baseMagic = "FLIPFLR1"
	baseSize  = len(baseMagic) + 4 + 8 + 8
)

func (b base) encode() []byte {
	data := append(make([]byte, 0, baseSize), baseMagic...)
	data = binary.BigEndian.AppendUint32(data, step)
	data = binary.BigEndian.AppendUint64(data, b.counter)
	return binary.BigEndian.AppendUint64(data, uint64(b.floor))
}

// decodeBase reads the content of a base index.
func decodeBase(data []byte) (base, error) {
	if len(data) != baseSize || !bytes.HasPrefix(data, []byte(baseMagic)) {
		return base{}, fmt.Errorf("%w: NV index %#x is not the base of a floor", ErrForeign, uint32(nvBase))
	}
	data = data[len(baseMagic):]
	if s := binary.BigEndian.Uint32(data); s != step {
		return base{}, fmt.Errorf("%w: the floor in the TPM has steps of %d seconds, want %d", ErrForeign, s, step)
	}
	b := base{binary.BigEndian.Uint64(data[4:]), int64(binary.BigEndian.Uint64(data[12:]))}
	if b.floor < 0 || b.floor > MaxNumber {
		return base{}, fmt.Errorf("%w: the floor in the TPM begins at %d", ErrForeign, b.floor)
	}
	return b, nil
}

// number is the floor that a counter value stands for.
func (b base) number(counter uint64) (int64, error) {
	if counter < b.counter {
		return 0, fmt.Errorf("%w: the counter is at %d and began at %d", ErrForeign, counter, b.counter)
	}
	if n := counter - b.counter; n <= uint64(math.MaxInt64-b.floor)/step {
		return b.floor + int64(n)*step, nil
	}
	return 0, fmt.Errorf("%w: the counter is at %d and began at %d", ErrForeign, counter, b.counter)
}

// index is an NV index as it is now.
type index struct {
	there, written, locked bool
	name                   tpm2.TPM2BName
}

// look finds out about an index, and that it is ours.
func (t *TPM) look(h tpm2.TPMHandle, want tpm2.TPMANV, size int) (index, error) {
	rsp, err := tpm2.NVReadPublic{NVIndex: h}.Execute(t.t)
	if absent(err) {
		return index{}, nil
	}
	if err != nil {
		return index{}, explain(fmt.Sprintf("looking at NV index %#x", uint32(h)), err)
	}
	pub, err := rsp.NVPublic.Contents()
	if err != nil {
		return index{}, explain(fmt.Sprintf("looking at NV index %#x", uint32(h)), err)
	}
	ix := index{there: true, written: pub.Attributes.Written, locked: pub.Attributes.WriteLocked, name: rsp.NVName}
	pub.Attributes.Written, pub.Attributes.WriteLocked = false, false
	if !bytes.Equal(tpm2.Marshal(pub.Attributes), tpm2.Marshal(want)) || int(pub.DataSize) != size || len(pub.AuthPolicy.Buffer) != 0 {
		return ix, fmt.Errorf("%w: NV index %#x has other attributes than the floor's", ErrForeign, uint32(h))
	}
	return ix, nil
}

func (t *TPM) define(h tpm2.TPMHandle, attr tpm2.TPMANV, size int, password []byte) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: owner(password),
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: h, NameAlg: tpm2.TPMAlgSHA256, Attributes: attr, DataSize: uint16(size)}),
	}.Execute(t.t)
	return explain(fmt.Sprintf("defining NV index %#x", uint32(h)), err)
}

func (t *TPM) readNV(h tpm2.TPMHandle, ix index, size int) ([]byte, error) {
	rsp, err := tpm2.NVRead{AuthHandle: plain(h, ix.name), NVIndex: tpm2.NamedHandle{Handle: h, Name: ix.name}, Size: uint16(size)}.Execute(t.t)
	if err != nil {
		return nil, explain(fmt.Sprintf("reading NV index %#x", uint32(h)), err)
	}
	return rsp.Data.Buffer, nil
}

func (t *TPM) increment(ix index) error {
	_, err := tpm2.NVIncrement{AuthHandle: plain(nvCounter, ix.name), NVIndex: tpm2.NamedHandle{Handle: nvCounter, Name: ix.name}}.Execute(t.t)
	return explain("raising the floor's counter", err)
}

func (t *TPM) counter(ix index) (uint64, error) {
	data, err := t.readNV(nvCounter, ix, 8)
	if err != nil {
		return 0, err
	}
	if len(data) != 8 {
		return 0, fmt.Errorf("%w: a counter of %d bytes", ErrForeign, len(data))
	}
	return binary.BigEndian.Uint64(data), nil
}

// floorState is what the two indices hold.
type floorState struct {
	base    base
	counter uint64
	at      index // the counter
	baseAt  index
}

// open reports whether the floor still waits for the first release with a number.
func (s floorState) open() bool { return !s.baseAt.locked }

var errInterrupted = fmt.Errorf("%w: provisioning was interrupted, or an index was deleted", ErrNotPrepared)

// state reads the base and the counter. ErrNotPrepared means that they are not there, or that provisioning was interrupted.
func (t *TPM) state() (s floorState, err error) {
	if s.at, err = t.look(nvCounter, counterAttributes, 8); err != nil {
		return s, err
	}
	if s.baseAt, err = t.look(nvBase, baseAttributes, baseSize); err != nil {
		return s, err
	}
	switch {
	case !s.at.there && !s.baseAt.there:
		return s, fmt.Errorf("%w: it keeps no floor", ErrNotPrepared)
	case !s.at.there || !s.at.written || !s.baseAt.there || !s.baseAt.written:
		return s, errInterrupted
	}
	data, err := t.readNV(nvBase, s.baseAt, baseSize)
	if err != nil {
		return s, err
	}
	if s.base, err = decodeBase(data); err != nil {
		return s, err
	}
	if s.counter, err = t.counter(s.at); err != nil {
		return s, err
	}
	if s.open() && s.base.floor != 0 {
		return s, errInterrupted
	}
	return s, nil
}

// begin writes the base and locks it, unless it is that of a floor of which no number is known.
func (t *TPM) begin(b base) error {
	ix, err := t.look(nvBase, baseAttributes, baseSize)
	if err != nil {
		return err
	}
	_, err = tpm2.NVWrite{
		AuthHandle: plain(nvBase, ix.name), NVIndex: tpm2.NamedHandle{Handle: nvBase, Name: ix.name},
		Data: tpm2.TPM2BMaxNVBuffer{Buffer: b.encode()},
	}.Execute(t.t)
	if err != nil {
		return explain("writing the floor's base", err)
	}
	if b.floor == 0 {
		return nil
	}
	if ix, err = t.look(nvBase, baseAttributes, baseSize); err != nil { // the first write changes its name
		return err
	}
	_, err = tpm2.NVWriteLock{AuthHandle: plain(nvBase, ix.name), NVIndex: tpm2.NamedHandle{Handle: nvBase, Name: ix.name}}.Execute(t.t)
	return explain("locking the floor's base", err)
}

// Floor reads the floor, in seconds since 1970, a whole number of days above where it began; 0 if it waits for the first release with a
// number. ErrNotPrepared means that there is none.
func (t *TPM) Floor() (int64, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, err := t.state()
	if err != nil || s.open() {
		return 0, err
	}
	return s.base.number(s.counter)
}

// Raise raises the floor to number, rounded down to a whole day above its beginning, or begins it there. One that is as high already stays. It makes
// some hundred steps at most and then returns ErrBehind. Power lost or ctx ended in between leaves it lower than wanted; raising it again goes
// on from there.
func (t *TPM) Raise(ctx context.Context, number int64) error {
	if number < 0 || number > MaxNumber {
		return fmt.Errorf("raising the floor: %w", errNumber(number))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	s, err := t.state()
	if errors.Is(err, ErrNotPrepared) && s.at.written && s.baseAt.written && !s.baseAt.locked {
		err = nil // power was lost between writing the base and locking it
	}
	if err != nil {
		return fmt.Errorf("raising the floor: %w", err)
	}
	if s.open() {
		if number == 0 {
			return nil
		}
		return t.begin(base{counter: s.counter, floor: number})
	}
	want := s.base.counter
	if number > s.base.floor {
		want += uint64(number-s.base.floor) / step
	}
	for n := s.counter; n < want; n++ {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("raising the floor: %w: %d days to go: %w", ErrBehind, want-n, err)
		}
		if n-s.counter == budget {
			return fmt.Errorf("raising the floor: %w: %d days to go", ErrBehind, want-n)
		}
		if err := t.increment(s.at); err != nil {
			return err
		}
	}
	return nil
}

// Provision makes the floor, beginning at number; 0 means where the first release with a number will be. It takes the owner's password. One that was interrupted is completed by calling it again; one
// that is complete is left as it is.
func (t *TPM) Provision(password []byte, number int64) error {
	if number < 0 || number > MaxNumber {
		return fmt.Errorf("provisioning the floor: %w", errNumber(number))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	switch s, err := t.state(); {
	case err == nil && s.open() && number > 0:
		return t.begin(base{counter: s.counter, floor: number})
	case err == nil || !errors.Is(err, ErrNotPrepared):
		return err
	}
	// The base is written last, and only that makes a floor: everything before it can be done again.
	c, err := t.look(nvCounter, counterAttributes, 8)
	if err != nil {
		return err
	}
	if !c.there {
		if err := t.define(nvCounter, counterAttributes, 8, password); err != nil {
			return err
		}
	}
	if c, err = t.look(nvCounter, counterAttributes, 8); err != nil {
		return err
	}
	if !c.written {
		if err := t.increment(c); err != nil {
			return err
		}
		if c, err = t.look(nvCounter, counterAttributes, 8); err != nil { // the first write changes its name
			return err
		}
	}
	n, err := t.counter(c)
	if err != nil {
		return err
	}
	b, err := t.look(nvBase, baseAttributes, baseSize)
	if err != nil {
		return err
	}
	if b.locked { // of a counter that was deleted
		if err := t.undefine(nvBase, b, password); err != nil {
			return err
		}
		b = index{}
	}
	if !b.there {
		if err := t.define(nvBase, baseAttributes, baseSize, password); err != nil {
			return err
		}
	}
	return t.begin(base{counter: n, floor: number})
}

func (t *TPM) undefine(h tpm2.TPMHandle, ix index, password []byte) error {
	_, err := tpm2.NVUndefineSpace{AuthHandle: owner(password), NVIndex: tpm2.NamedHandle{Handle: h, Name: ix.name}}.Execute(t.t)
	return explain(fmt.Sprintf("deleting NV index %#x", uint32(h)), err)
}

// Remove deletes the floor. It takes the owner's password. Removing what is not there does nothing; what another program made in the same place stays.
func (t *TPM) Remove(password []byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, x := range []struct {
		h    tpm2.TPMHandle
		attr tpm2.TPMANV
		size int
	}{{nvBase, baseAttributes, baseSize}, {nvCounter, counterAttributes, 8}} {
		ix, err := t.look(x.h, x.attr, x.size)
		if err != nil {
			return err
		}
		if !ix.there {
			continue
		}
		if err := t.undefine(x.h, ix, password); err != nil {
			return err
		}
	}
	return nil
}

// errNumber says that a number can be no release's.
func errNumber(n int64) error {
	if n > MaxNumber {
		return fmt.Errorf("%w: %d is after the year 2100; it counts seconds, not milliseconds", ErrNumber, n)
	}
	return fmt.Errorf("%w: %d is negative", ErrNumber, n)
}
